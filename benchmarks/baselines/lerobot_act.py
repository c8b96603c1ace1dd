"""LeRobot's own ACT on the same demonstrations, starts and loop: a baseline in an environment of its own.

    PYTHON benchmarks/baselines/lerobot_act.py train DATASET OUT [--steps 2400] [--batch 32] [--seed 0] [--blind]
        [--chunk 16] [--published] [--own-statistics]
    PYTHON benchmarks/baselines/lerobot_act.py play OUT SUCCESS [--env metaworld] [--set env.task=reach-v3 ...]
        [--episodes 100] [--horizon 4] [--simulators 4] [--seed 0] [--blind] [--packages PATH]

`train` is LeRobot's `train` command, called with its own settings; the sizes and the rate are those of
`model=act_tiny` and `recipe=lerobot` here, or with `--published` LeRobot's defaults; the backbone starts from nothing.
`play` takes its chunks from LeRobot's policy and processors, and runs them as `tools.rollout` does: the same starts,
the same number of steps of each chunk. `--packages`: the folder with the simulator, which may be another environment's.
Both run offline.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import site
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled")
STUBS = Path(__file__).parents[2] / "tests" / "side_by_side" / "stubs"
sys.path.insert(0, str(STUBS))  # its video transforms want a torchvision that isn't built for this torch

import numpy as np  # noqa: E402
import torch  # noqa: E402

sys.modules["transformers"] = None  # type: ignore[assignment]  # its policies of transformers are of a release before 5

from lerobot.configs.default import DatasetConfig  # noqa: E402
from lerobot.configs.train import TrainPipelineConfig  # noqa: E402
from lerobot.policies.act.configuration_act import ACTConfig  # noqa: E402
from lerobot.policies.act.modeling_act import ACTPolicy  # noqa: E402
from lerobot.policies.factory import make_pre_post_processors  # noqa: E402
from lerobot.scripts import lerobot_train  # noqa: E402

del sys.modules["transformers"]

TINY = {"dim_model": 64, "n_heads": 4, "dim_feedforward": 128, "n_vae_encoder_layers": 1, "n_encoder_layers": 1}
TINY |= {"latent_dim": 8, "dropout": 0.0, "optimizer_lr": 5e-4, "optimizer_lr_backbone": 5e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training, playing = commands.add_parser("train"), commands.add_parser("play")
    training.set_defaults(work=train)
    training.add_argument("dataset", type=Path)
    training.add_argument("out", type=Path)
    for name, value in (("steps", 2400), ("batch", 32), ("seed", 0), ("chunk", 16)):
        training.add_argument(f"--{name}", type=int, default=value)
    for name in ("blind", "published", "own-statistics"):
        training.add_argument(f"--{name}", action="store_true")
    playing.set_defaults(work=play)
    playing.add_argument("out", type=Path)
    playing.add_argument("success", type=Path)
    playing.add_argument("--env", default="metaworld")
    playing.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    for name, value in (("episodes", 100), ("horizon", 4), ("simulators", 4), ("seed", 0)):
        playing.add_argument(f"--{name}", type=int, default=value)
    playing.add_argument("--blind", action="store_true")
    playing.add_argument("--packages", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work(options)


def train(options: argparse.Namespace) -> None:
    """LeRobot's training, and how long it took beside what it wrote."""
    size = {} if options.published else TINY
    policy = ACTConfig(
        chunk_size=options.chunk,
        n_action_steps=options.chunk,
        pretrained_backbone_weights=None,
        device="cpu",
        push_to_hub=False,
        **size,
    )
    data = DatasetConfig(
        "benchmark/set",
        root=str(options.dataset),
        video_backend="pyav",
        use_imagenet_stats=not options.own_statistics,
    )
    config = TrainPipelineConfig(
        dataset=data,
        policy=policy,
        output_dir=options.out,
        seed=options.seed,
        num_workers=1,
        batch_size=options.batch,
        steps=options.steps,
        eval_freq=0,
        log_freq=100,
        save_freq=options.steps,
    )
    sys.argv = sys.argv[:1]  # LeRobot reads it again
    if options.blind:
        make = lerobot_train.make_dataset
        lerobot_train.make_dataset = lambda cfg: Blind(make(cfg))
    started = time.perf_counter()
    lerobot_train.train(config)
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    spent = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, who))
    told = {"steps": options.steps, "batch": options.batch, "seconds": time.perf_counter() - started, "cpu_s": spent}
    (options.out / "cost.json").write_text(json.dumps(told) + "\n")


class Blind(torch.utils.data.Dataset):
    """The dataset with black pictures."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = self.dataset[row]
        return item | {key: torch.zeros_like(item[key]) for key in self.dataset.meta.camera_keys}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["dataset"], name)


def play(options: argparse.Namespace) -> None:
    """The success rate, as `tools.rollout` writes it."""
    if options.packages is not None:
        site.addsitedir(str(options.packages))
    from opentau_train import cli
    from opentau_train.simulation.rollout import Rollouts, Running
    from opentau_train.simulation.success import in_words, success_row

    folder = options.out / "checkpoints" / "last" / "pretrained_model"
    policy = ACTPolicy.from_pretrained(folder).eval()
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    tree = cli.compose([f"+simulation@env={options.env}", *options.set], primary=None)["env"]
    cameras = [key.removeprefix("observation.images.") for key in policy.config.image_features]
    rollouts = Rollouts(options.episodes, options.seed, options.horizon, options.simulators, 3600.0, videos=0)
    with closing(Running("env", tree, rollouts, 0, 1)) as running:
        while running.active:
            seen, _ = running.observations()
            batch = {"observation.state": torch.from_numpy(np.stack([s.state for s in seen]))}
            for camera in cameras:
                pictures = np.stack([s.images[camera] for s in seen]).transpose(0, 3, 1, 2) / np.float32(255)
                batch[f"observation.images.{camera}"] = torch.from_numpy(pictures * (not options.blind))
            with torch.no_grad():
                chunk = after(policy.predict_action_chunk(before(batch)))
            running.take(chunk.float().numpy())
    row = success_row(running.results, running.num_lost, "lerobot_act")
    print(in_words(row, "lerobot_act"))
    outcomes = [{"success": bool(s), "steps": int(n)} for s, n, _ in running.results.tolist()]
    options.success.mkdir(parents=True, exist_ok=True)
    told = {"checkpoint": str(folder), "env": tree, "ranks": 1, "metrics": row, "episodes": outcomes}
    (options.success / "rollout.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
