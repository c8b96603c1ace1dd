"""Runs that train several modes: no mode dilutes another's losses, each is counted, and any mix trains on."""

from __future__ import annotations

import json
from contextlib import closing

import numpy as np
import pytest
import torch

from opentau_train.data.batch import stack
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.models.draws import Draws
from opentau_train.models.policy import build_policy
from opentau_train.types import Address
from tests.lerobot_writer import Camera, Dataset, write
from tests.modal import MODAL
from tests.program import TOY, metrics, train_here
from tests.unit.config.test_modes import tree
from tests.unit.data.lerobot.test_future import break_image
from tests.unit.data.load.test_real_stream import mixture

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")

MAIN = "data.sources.main"
JOINT = [f"{MAIN}.mode=joint", f"{MAIN}.mode_probabilities={{policy:1,wam:1,forward_dynamics:1,inverse_dynamics:1}}"]
RUN = [*TOY, *MODAL, "validation.every=0"]


def test_training_is_counted_by_mode_and_a_policy_s_loss_is_that_of_its_own_samples(tmp_path):
    """Against the recorded sums of each sample, and the modes that are drawn for them."""
    run = train_here([*RUN, *JOINT, "trainer.steps=3", "flight_recorder=true"], tmp_path / "run")
    rows, opened = metrics(run), mixture(tmp_path, *MODAL, *JOINT)
    lines = [json.loads(line) for path in (run / "flight").iterdir() for line in path.read_text().splitlines()]
    for line in lines:
        row = rows[line["step"]]
        with closing(SampleBuilder(opened, training=True)) as builder:
            columns = zip(line["dataset"], line["episode"], line["frame"], line["pass"], strict=True)
            modes = np.array([builder.build(0, Address(*where))["mode"] for where in columns])
        for mode in opened.spec.modes:
            assert row[f"Training/{mode}/Samples"] == (modes == mode).sum()
            assert row[f"Training/{mode}/Share"] == (modes == mode).mean()
            for term, sums in line["sum"].items():
                count = np.array(line["count"][term])[modes == mode].sum()
                assert (f"Training/{mode}/{term.upper()}" in row) == (count > 0)
                if count:
                    mean = np.array(sums)[modes == mode].sum() / count
                    assert row[f"Training/{mode}/{term.upper()}"] == pytest.approx(mean, rel=1e-5)
    assert {"Training/policy/MSE", "Training/wam/VISION_MSE", "Training/main/default/inverse_dynamics/MSE"} <= {
        tag for row in rows.values() for tag in row
    }


@pytest.mark.slow
def test_a_run_of_one_mode_has_no_tags_of_modes(tmp_path):
    rows = metrics(train_here([*RUN, "trainer.steps=1", "validation.every=1"], tmp_path / "run"))[1]
    assert "Training/main/default/MSE" in rows and "Validation/main/default/MSE" in rows
    assert not any("policy" in tag or "Share" in tag or "Samples" in tag.split("/") for tag in rows)


def test_a_policy_s_sums_in_a_joint_batch_are_those_in_a_batch_of_its_own_bit_for_bit(tmp_path):
    addresses = [Address(0, e, f, 0) for e in (0, 1) for f in range(2, 8)]
    opened = [mixture(tmp_path, *MODAL, *words) for words in (JOINT, [])]
    policy = build_policy(tree([*TOY, *MODAL])["model"], opened[0].spec).eval()
    batches = []
    for m in opened:
        m = m.for_policy(policy.wants())
        with closing(SampleBuilder(m, training=True)) as builder:
            batches.append(stack([builder.build(0, address) for address in addresses], m.spec))
    joint = batches[0]
    own = torch.tensor([mode == "policy" for mode in joint.mode])
    assert 0 < own.sum() < len(own)
    for batch in batches:
        assert all(
            torch.equal(c, policy.term_counts(batch)[t]) for t, (_, c) in policy(batch, Draws(batch.key)).items()
        )
    terms, others = (policy(batch, Draws(batch.key)) for batch in batches)
    for term in ("mse", "ce"):
        for values, wanted in zip(terms[term], others[term], strict=True):
            assert torch.equal(values[own], wanted[own])
    seen = [mode in ("wam", "forward_dynamics") for mode in joint.mode]
    assert (terms["vision_mse"][1] > 0).tolist() == seen and not others["vision_mse"][1].any()
    # A sample of another mode gives a term that it doesn't supervise no part of the gradient's denominator either.
    assert terms["ce"][1].tolist() == [
        float(c) if mode in ("policy", "wam") else 0.0 for c, mode in zip(others["ce"][1], joint.mode, strict=True)
    ]


@pytest.mark.parametrize("mode", ["policy", "wam", "forward_dynamics", "inverse_dynamics"])
def test_every_parameter_gets_a_gradient_in_a_batch_of_any_mode(mode, tmp_path):
    opened = mixture(tmp_path, *MODAL, f"{MAIN}.mode={mode}")
    policy = build_policy(tree([*TOY, *MODAL])["model"], opened.spec)
    opened = opened.for_policy(policy.wants())
    with closing(SampleBuilder(opened, training=True)) as builder:
        batch = stack([builder.build(0, Address(0, 0, f, 0)) for f in (1, 5)], opened.spec)
    terms = policy(batch, Draws(batch.key))
    sum(policy.loss_weights[term] * sums.sum() for term, (sums, _) in terms.items()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


@pytest.mark.slow
def test_batches_in_which_nothing_has_a_term_train_on(tmp_path):
    """The dynamics of pictures, and hardly any pictures: some steps have nothing to learn from."""
    words = [*RUN, f"{MAIN}.mode=forward_dynamics", "~data.sources.old", "data.dropout.camera=0.9"]
    rows = metrics(train_here([*words, "trainer.steps=6", "trainer.global_batch_size=2"], tmp_path / "run"))
    silent = [row for row in rows.values() if "Training/VISION_MSE" not in row]
    assert 0 < len(silent) < 6
    assert all(row["Training/Loss"] == row["Training/GradNorm"] == row["Training/SkippedSteps"] == 0 for row in silent)


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["mse_weight", "ce_weight"])
def test_a_weight_of_0_turns_a_term_off_and_its_head_stays_as_it_is(weight, tmp_path):
    words = [*TOY, "trainer.steps=2", "validation.every=0", "optimizer.weight_decay=0", f"model.{weight}=0"]
    run = train_here([*words, "checkpoint.every=1"], tmp_path / "run")
    from safetensors.numpy import load_file

    first, last = (load_file(run / f"checkpoints/{s:08d}/pretrained_model/model.safetensors") for s in (1, 2))
    head, other = ("velocity_out.weight", "bins_out.weight")[:: 1 if weight == "mse_weight" else -1]
    assert np.array_equal(first[head], last[head]) and not np.array_equal(first[other], last[other])
    rows = metrics(run)[2]
    other_term = ("Training/CE", "Training/MSE")[weight != "mse_weight"]
    assert rows["Training/Loss"] == rows[other_term] * (0.1 if weight == "mse_weight" else 1.0)


@pytest.mark.slow
def test_a_joint_run_that_is_resumed_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    words = [*TOY, *MODAL, *JOINT, "scheduler=constant", "checkpoint.every=2", "validation.every=2"]
    whole = metrics(train_here([*words, "trainer.steps=4"], tmp_path / "whole"))
    train_here([*words, "trainer.steps=2"], tmp_path / "halves")
    halves = metrics(train_here([*words, "trainer.steps=4", "resume=auto"], tmp_path / "halves"))
    assert halves == whole
    assert "Validation/main/default/inverse_dynamics/MSE" in whole[4]


@pytest.mark.slow
def test_a_window_that_can_not_be_read_is_left_out_of_all_modes_and_counted_once(tmp_path):
    cameras = {"observation.images.wrist": Camera(size=(16, 16), codec=None)}
    root = write(tmp_path / "set", Dataset(lengths=(8, 8), cameras=cameras))
    break_image(root, 3)
    words = ["+recipe=lerobot", *RUN[RUN.index("data.num_workers=0") :], f"{MAIN}.root={root}", *JOINT]
    held_out = [f"{MAIN}.val_episodes=[0]", "validation.every=1", "validation.on_bad_sample=skip"]
    rows = metrics(train_here([*words, *held_out, "trainer.steps=1", "data.future.stride=1"], tmp_path / "run"))[1]
    # Its own window, and those of which it is a future frame.
    assert rows["Validation-LeftOut/Windows"] == 3
    modes = ("policy/MSE", "wam/MSE", "wam/VISION_MSE", "forward_dynamics/VISION_MSE", "inverse_dynamics/MSE")
    assert [rows[f"Validation/main/default/{mode}/N"] for mode in modes] == [5] * 5
