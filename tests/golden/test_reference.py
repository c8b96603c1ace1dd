"""What a run trains on, and what becomes of the weights, against an implementation that shares no line with it."""

from __future__ import annotations

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from opentau_train import cli, loop
from tests.program import DATA, metrics
from tests.reference import Reference, Robot, initial

STEPS = 5
CLIP = 3.4
HELD_OUT = {"main": 2, "old": 1}
WORDS = [
    "+recipe=lerobot",
    f"data.sources.main.root={DATA / 'lerobot_v30'}",
    "data.sources.main.val_episodes=[2]",
    "data.sources.main.chunk_length=4",
    f"data.sources.old.root={DATA / 'lerobot_v21'}",
    "data.sources.old.val_episodes=[1]",
    "data.sources.old.chunk_length=3",  # its chunks are shorter, its robot has six joints of seven
    "data.sources.old.robot_type=toy6",
    "data.image_size=[8,8]",
    "data.num_workers=0",
    "data.max_samples_per_batch=5",  # micro-batches of 5, 5 and 2
    "trainer.global_batch_size=12",
    f"trainer.steps={STEPS}",
    "trainer.log_every=1",
    f"trainer.grad_clip={CLIP}",
    "trainer.ema_decay=0.5",
    "optimizer.lr=0.02",
    "optimizer.weight_decay=0.3",
    "optimizer.betas=[0.8,0.95]",
    "optimizer.eps=1e-4",
    "scheduler=constant",
    "scheduler.warmup_steps=2",
    "validation.every=1",
    "checkpoint.every=1",
    "checkpoint.keep_last=null",
    "flight_recorder=true",
    "logger=none",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    tree = cli.compose([*WORDS, f"paths.run_dir={folder / 'run'}", f"paths.cache_dir={folder / 'cache'}"])
    tree["model"] = {"_target_": "tests.reference.LinearPolicy"}
    assert loop.run(cli.checked(tree), tree) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def robots():
    return {
        "main": Robot(DATA / "lerobot_v30", (HELD_OUT["main"],), chunk=4),
        "old": Robot(DATA / "lerobot_v21", (HELD_OUT["old"],), chunk=3),
    }


@pytest.fixture(scope="module")
def batches(run):
    """Of each step the (dataset, episode, frame) of its samples."""
    (file,) = (run / "flight").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    names = lines[0]["datasets"]
    return [
        [(names[d], e, f) for d, e, f in zip(line["dataset"], line["episode"], line["frame"], strict=True)]
        for line in lines
    ]


@pytest.fixture(scope="module")
def steps(batches, robots):
    """Of each step the reference behind it, the mean squared error, and the gradient's norm."""
    reference = Reference(clip=CLIP, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-4, ema=0.5, term_weight=2.0)
    taken = []
    for step, batch in enumerate(batches):
        samples = [robots[name].sample(episode, frame) for name, episode, frame in batch]
        rate = 0.02 * min(1.0, (step + 1) / 2)
        numbers = reference.step(samples, rate)
        taken.append((copy.deepcopy(reference), *numbers))
    return taken


def test_batches_are_of_training_windows_by_their_share(batches, robots):
    windows = {name: sum(len(e[0]) for n, e in r.episodes.items() if n not in r.held_out) for name, r in robots.items()}
    seen = Counter(name for batch in batches for name, _, _ in batch)
    assert len(batches) == STEPS and {len(batch) for batch in batches} == {12}
    assert not any(episode == HELD_OUT[name] for batch in batches for name, episode, _ in batch)
    for name, num in windows.items():
        assert abs(seen[name] - 12 * STEPS * num / sum(windows.values())) <= 2
    cut = [len(robots[n].episodes[e][0]) - f < robots[n].chunk for batch in batches for n, e, f in batch]
    assert any(cut), "chunks that end with their episodes are among them"


def test_every_step_is_the_references(run, steps):
    """Loss, gradient's norm, clipped gradient, AdamW, average: all over micro-batches of unequal sizes."""
    rows = metrics(run)
    norms = [norm for _, _, norm in steps]
    assert min(norms) < CLIP < max(norms), "some steps are clipped, and some aren't"
    for step, (reference, error, norm) in enumerate(steps, start=1):
        assert rows[step]["Training/MSE"] == pytest.approx(error, rel=1e-5)
        assert rows[step]["Training/Loss"] == pytest.approx(2 * error, rel=1e-5)
        assert rows[step]["Training/GradNorm"] == pytest.approx(norm, rel=1e-5)
        saved = policy_of(run, step)
        for values, own in zip(saved["model"], reference.parameters, strict=True):
            np.testing.assert_allclose(values, own, rtol=1e-5, atol=1e-6)
        for values, own in zip(saved["ema"], reference.average, strict=True):
            np.testing.assert_allclose(values, own, rtol=1e-5, atol=1e-6)


def test_losses_by_dataset_are_the_references(run, batches, steps, robots):
    rows = metrics(run)
    for step, batch in enumerate(batches[1:], start=2):
        before = steps[step - 2][0]
        for name in robots:
            samples = [robots[name].sample(e, f) for n, e, f in batch if n == name]
            errors, counts = before.errors(samples)
            expected = float((errors**2).sum() / counts.sum())
            assert rows[step][f"Training/{name}/default/MSE"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("prefix", "average"), [("Validation", False), ("Validation-EMA", True)])
def test_a_validation_is_the_references(prefix, average, run, steps, robots):
    """Over all windows of the held-out episodes, those whose chunk ends with the episode included."""
    rows = metrics(run)
    trained = {n: sum(len(e[0]) for k, e in r.episodes.items() if k not in r.held_out) for n, r in robots.items()}
    for step, (reference, _, _) in enumerate(steps, start=1):
        means = {}
        for name, robot in robots.items():
            frames = range(len(robot.episodes[HELD_OUT[name]][0]))
            samples = [robot.sample(HELD_OUT[name], frame) for frame in frames]
            errors, counts = reference.errors(samples, average)
            means[name] = float((errors**2).sum() / counts.sum())
            assert rows[step][f"{prefix}/{name}/default/MSE"] == pytest.approx(means[name], rel=1e-5)
            assert rows[step][f"{prefix}/{name}/default/MSE/N"] == len(frames)
        whole = sum(means[name] * trained[name] for name in robots) / sum(trained.values())
        assert rows[step][f"{prefix}/MSE"] == pytest.approx(whole, rel=1e-5)
        assert rows[step][f"{prefix}/Loss"] == pytest.approx(2 * whole, rel=1e-5)


def policy_of(run, step: int) -> dict[str, list[np.ndarray]]:
    """{"model" or "ema": weight and bias} in the checkpoint of `step`."""
    parts = {p: {f"out.{name}": torch.empty_like(torch.from_numpy(v)) for name, v in named()} for p in ("model", "ema")}
    dcp.load(parts, checkpoint_id=run / "checkpoints" / f"{step:08d}" / "state", no_dist=True)
    return {part: [value.numpy() for value in tensors.values()] for part, tensors in parts.items()}


def named():
    return zip(("weight", "bias"), initial(), strict=True)
