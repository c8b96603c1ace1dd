"""Runs of the world-action model on samples of every mode: repeated, resumed, served to a robot."""

from __future__ import annotations

import numpy as np
import pytest

from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.models.draws import Draws
from tests.program import TOY, metrics, train_here

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")

EVEN = "{policy:1,wam:1,forward_dynamics:1,inverse_dynamics:1}"
RUN = [*TOY, "model=wam_tiny", "data.future.num_frames=2", "logger=none", "validation.max_samples_per_group=2"]
RUN += ["data.sources.main.mode=joint", f"data.sources.main.mode_probabilities={EVEN}", "data.sources.old.mode=wam"]
SHORT = [*RUN, "validation.every=4", "checkpoint.every=2", "trainer.ema_decay=0.5"]


def numbers(run) -> dict[int, dict]:
    """The rows of a run without what a clock says."""
    kept = ("Training", "Validation")
    return {step: {k: v for k, v in row.items() if k.startswith(kept)} for step, row in metrics(run).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_here([*SHORT, "trainer.steps=4"], tmp_path_factory.mktemp("joint") / "whole")


def test_a_joint_run_resumed_in_its_middle_is_the_uninterrupted_one_bit_for_bit(whole, tmp_path):
    """Its first half repeats the other run's."""
    run = train_here([*SHORT, "trainer.steps=4", "trainer.stop_after=2"], tmp_path / "run")
    assert max(metrics(run)) == 2
    train_here([*SHORT, "trainer.steps=4", "resume=auto"], run)
    assert numbers(run) == numbers(whole) and len(numbers(run)) == 4
    weights = "checkpoints/00000004/pretrained_model/model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    modes = {tag.split("/")[1] for row in numbers(run).values() for tag in row if tag.endswith("/Share")}
    assert modes == {"policy", "wam", "forward_dynamics", "inverse_dynamics"}


def test_a_robot_is_given_the_actions_of_its_mode_without_a_future(whole):
    loaded = load_policy(whole / "checkpoints" / "00000004" / "pretrained_model")
    policy = loaded.policy.eval()
    assert policy.spec.future == 2 and policy.spec.modes
    print(loaded)
