"""The golden losses: four steps and a validation of a small policy on real data, through each stack of transforms."""

from __future__ import annotations

from pathlib import Path

from tests.program import DATA, TINY_POLICY, metrics, train_here

RUN = ["+recipe=lerobot", f"data.sources.main.root={DATA / 'lerobot_v30'}", "data.sources.main.val_split_ratio=0.3"]
RUN += ["data.num_workers=0", "trainer.global_batch_size=4", "trainer.log_every=1", "scheduler.warmup_steps=1"]
RUN += [
    "optimizer.lr=0.03",
    "trainer.steps=4",
    "validation.every=4",
    "validation.max_samples_per_group=4",
    "logger=none",
    *TINY_POLICY,
]

JOINTS = "[{kind:joint,dims:6,unit:rad%s},{kind:gripper,polarity:closed,range:[0,1]%s}]"
POSES = "[{kind:position,unit:m%s},{kind:rotation,rotation:euler_xyz,unit:rad%s},{kind:gripper%s}]"
ABSOLUTE = ",reference:absolute"


def declared(parts: str) -> str:
    """The convention of the dataset whose state and actions are `parts`."""
    num = parts.count("%s")
    state, actions = parts % (("",) * num), parts % ((ABSOLUTE,) * num)
    return f"data.sources.main.convention={{state:{state},actions:{actions}}}"


STACKS = {
    "none": [],
    "droid_cosmos": ["data/augment=droid_cosmos"],
    "openpi": ["data/augment=openpi"],
    "lerobot": ["data/augment=lerobot"],
    "dropout": ["data.dropout.prompt=0.5", "data.dropout.state=0.5", "data.dropout.camera=0.5"],
    "joint_deltas": [
        declared(JOINTS),
        "data.convention={actions:[{kind:joint,reference:delta_start},{kind:gripper,polarity:open}]}",
        "data.normalization_per_timestep=true",
    ],
    "pose_deltas": [
        declared(POSES),
        "data.convention={actions:[{kind:position,reference:delta_start,frame:tool},"
        "{kind:rotation,rotation:rot6d,reference:delta_start,frame:tool},{kind:gripper}]}",
        "data.normalization=quantiles",
    ],
}

MODES = ["model=wam_tiny", "data.future.num_frames=2"]  # a recipe's TINY_POLICY sets the sizes
_MODE = "data.sources.main.mode"
STACKS |= {mode: [*MODES, f"{_MODE}={mode}"] for mode in ("policy", "wam", "forward_dynamics", "inverse_dynamics")} | {
    "joint": [
        *MODES,
        f"{_MODE}=joint",
        f"{_MODE}_probabilities={{policy:1,wam:1,forward_dynamics:1,inverse_dynamics:1}}",
    ]
}


def make(folder: Path) -> dict[str, list[float]]:
    """{stack: the losses of the second and the fourth step, and the held-out loss}: what the golden file holds."""
    losses = {}
    for name, words in STACKS.items():
        rows = metrics(train_here([*RUN, *words], folder / name))
        losses[name] = [rows[2]["Training/Loss"], rows[4]["Training/Loss"], rows[4]["Validation/Loss"]]
    return losses
