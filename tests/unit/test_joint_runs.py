"""Runs of the world-action model on samples of every mode: repeated, resumed, served to a robot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.config.modes import MODES
from opentau_train.models.draws import Draws
from opentau_train.tools import export
from tests.program import TOY, metrics, train_here

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")

EVEN = "{policy:1,wam:1,forward_dynamics:1,inverse_dynamics:1}"
RUN = [*TOY, "model=wam_tiny", "data.future.num_frames=2", "logger=none", "validation.max_samples_per_group=2"]
RUN += ["data.sources.main.mode=joint", f"data.sources.main.mode_probabilities={EVEN}", "data.sources.old.mode=wam"]
SHORT = [*RUN, "validation.every=4", "checkpoint.every=2", "trainer.ema_decay=0.5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_here([*SHORT, "trainer.steps=4"], tmp_path_factory.mktemp("joint") / "whole")


@pytest.mark.slow
def test_a_joint_run_resumed_in_its_middle_is_the_uninterrupted_one_bit_for_bit(whole, tmp_path):
    """Its first half repeats the other run's."""
    run, words = tmp_path / "run", [*SHORT, "trainer.steps=4"]
    with pytest.raises(AssertionError):  # stopped: exit code 75
        train_here([*words, "trainer.stop_after=2"], run)
    assert max(metrics(run)) == 2
    train_here([*words, "resume=auto"], run)
    assert metrics(run) == metrics(whole) and len(metrics(run)) == 4
    weights = "checkpoints/00000004/pretrained_model/model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    modes = {tag.split("/")[1] for row in metrics(run).values() for tag in row if tag.endswith("/Share")}
    assert modes == {"policy", "wam", "forward_dynamics", "inverse_dynamics"}


@pytest.mark.slow
def test_an_exported_policy_acts_on_what_a_robot_sees_and_foresees_it_too(whole, tmp_path):
    """In the mode policy, on which it was trained: the future is hidden, and need not be given."""
    assert export.main([f"checkpoint={whole}", f"out={tmp_path / 'policy.safetensors'}"]) == 0
    loaded = load_policy(tmp_path / "policy.safetensors")
    camera, picture = loaded.spec.cameras[0], np.full((32, 32, 3), 90, np.uint8)
    seen = {
        "images": {camera: picture},
        "state": np.zeros(len(loaded.stats["toy6::default"].state.mean)),
        "prompt": "go",
    }
    batch = loaded.observe([seen], "toy6::default")
    assert batch.mode_code.tolist() == [MODES.index("policy")] and not batch.future_mask[camera].any()
    chunk = loaded.policy.sample_actions(batch, Draws(batch.key))
    assert torch.equal(chunk, loaded.policy.sample_actions(batch, Draws(batch.key))) and chunk.isfinite().all()
    foreseen = batch.replace(mode_code=torch.tensor([MODES.index("wam")]))
    frames = loaded.policy.sample_future(foreseen, Draws(batch.key))[camera]
    assert frames.shape == (1, 2, 3, 32, 32) and not torch.equal(
        loaded.policy.sample_actions(foreseen, Draws(batch.key)), chunk
    )
