"""Recipes with published numbers: what they compose; each trains, validates, goes on and exports on data in the schema
that it is for."""

from __future__ import annotations

import pytest

from opentau_train import cli
from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.config.settings import load_settings
from opentau_train.config.typed import instantiate
from opentau_train.data.builtin.droid import SampleSpec, ensure_droid_sample
from opentau_train.errors import EXIT_OK
from opentau_train.tools import plan
from opentau_train.tools.export import ExportSettings, export
from tests.lerobot_writer import Camera, Dataset, vector, write
from tests.nightly import by_day
from tests.program import TINY_POLICY, metrics, train_here

JOINTS = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos", "gripper.pos"]
ARM = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
MOTORS = {"motors": [f"{side}_{joint}" for side in ("left", "right") for joint in ARM]}
SCHEMAS = {
    "aloha": Dataset(
        lengths=(9, 8, 7, 9),
        fps=50,
        version="v2.1",
        cameras={"observation.images.top": Camera()},
        columns={"observation.state": vector(14, names=MOTORS), "action": vector(14, 0.5, names=MOTORS)},
        info={"robot_type": "aloha"},
    ),
    "so101": Dataset(
        lengths=(9, 8, 7, 9),
        fps=30,
        cameras={f"observation.images.{name}": Camera() for name in ("front", "wrist")},
        columns={"observation.state": vector(6, names=JOINTS), "action": vector(6, 0.5, names=JOINTS)},
        info={"robot_type": "so101_follower"},
    ),
    "libero": Dataset(
        lengths=(9, 8, 7, 9),
        fps=10,
        version="v2.1",
        cameras={name: Camera() for name in ("image", "wrist_image")},
        columns={"state": vector(8, names=["state"]), "actions": vector(7, 0.5, names=["actions"])},
        info={"robot_type": "panda"},
    ),
}
POLICIES = {
    "aloha": ["model=act_tiny"],
    "so101": ["model=act_tiny"],
    "libero": ["model=pi05_tiny", "model.vision.patch_size=8"],
}
SMALL = ["data.image_size=[32,32]", "data.chunk_length=4", "data.num_workers=0", "logger=none", "trainer.steps=4"]
SMALL += ["trainer.global_batch_size=4", "trainer.log_every=1", "checkpoint.every=2", "trainer.precision=no"]
SMALL += ["validation.every=4", "validation.max_samples_per_group=4", "data.sources.main.val_split_ratio=0.3"]
ROWS = {"aloha": 14, "so101": 6, "libero": 7}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", by_day(POLICIES, "aloha"))
def test_a_recipe_works_on_its_schema(recipe, tmp_path):
    root = write(tmp_path / "set", SCHEMAS[recipe])
    words = [f"+recipe={recipe}", f"data.sources.main.root={root}", *POLICIES[recipe], *SMALL]
    whole = train_here(words, tmp_path / "whole")
    rows = metrics(whole)
    assert any(tag.startswith("Validation/") for tag in rows[4])
    resumed = train_here([*words, f"resume={whole}/checkpoints/00000002"], tmp_path / "resumed")
    assert metrics(resumed)[4] == rows[4]
    out, _ = export(ExportSettings(str(resumed), str(tmp_path / "policy.safetensors")))
    loaded = load_policy(out)
    assert loaded.policy.spec.action_dim == ROWS[recipe]
    columns = ("base", "wrist") if recipe == "libero" else SCHEMAS[recipe].cameras
    assert sorted(loaded.policy.spec.cameras) == sorted(column.rpartition(".")[2] for column in columns)


# ---------------------------------------------------------------- droid_policy at its scales

TINY = ["model=flow_tiny", *TINY_POLICY, "data.num_workers=0", "trainer.steps=2", "logger=none", "trainer.precision=no"]
TINY += [
    "trainer.global_batch_size=8",
    "parallelism.data_parallel_shard_degree=1",
    "validation.max_samples_per_group=4",
]


@pytest.fixture(scope="module")
def droid_root(tmp_path_factory):
    spec = SampleSpec(num_episodes=4, min_frames=60, max_frames=70, episodes_per_data_file=2, episodes_per_video_file=2)
    return ensure_droid_sample(tmp_path_factory.mktemp("cache"), spec)["joint"]


@pytest.mark.slow
@pytest.mark.parametrize("scale", by_day(["laptop", "node", "cluster"], "node"))
def test_droid_policy_takes_two_steps_at_each_scale(scale, droid_root, tmp_path, monkeypatch):
    monkeypatch.setenv("DROID_ROOT", str(droid_root))
    run = train_here(["+recipe=droid_policy", f"scale={scale}", *TINY], tmp_path / "run")
    assert 2 in metrics(run) and "Validation/Loss" in metrics(run)[2]


def test_the_cluster_has_the_published_numbers(monkeypatch):
    settings = load_settings(cli.compose(["+recipe=droid_policy", "scale=cluster"]))
    trainer, optimizer = settings.trainer, settings.optimizer
    assert (trainer.global_batch_size, trainer.steps, trainer.grad_clip) == (8192, 10_000, 1.0)
    assert (optimizer.lr, optimizer.weight_decay) == (pytest.approx(2e-4 * 0.4), 0.05)
    assert (tuple(optimizer.options["betas"]), optimizer.options["eps"]) == ((0.9, 0.99), 1e-8)
    assert {rule.lr_scale for rule in optimizer.groups.values()} == {5.0}
    schedule = instantiate(settings.scheduler, "scheduler")
    assert [round(schedule(step, trainer.steps), 4) for step in (0, 5_000, 9_999)] == [1.0, 0.95, 0.9]
    assert settings.data.chunk_length == 32 and settings.data.dropout.prompt == 0.1
    assert settings.data.transforms["augment"]["crop"] == [0.9025, 0.9025]


@pytest.mark.slow
def test_the_cluster_is_planned_for_64_ranks(droid_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DROID_ROOT", str(droid_root))
    words = ["+recipe=droid_policy", "scale=cluster", "model=flow_tiny", *TINY_POLICY, "trainer.steps=2"]
    words += ["trainer.global_batch_size=64", f"paths.cache_dir={tmp_path}"]
    assert plan.main([*words, "--ranks", "64", "--batches", "1"]) == EXIT_OK
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["64", "1"]]
    assert row.endswith("MiB")
