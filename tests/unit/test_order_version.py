"""A run goes on in the order that it began with, whatever this version's is."""

import pytest

from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.tape import VERSION
from tests.program import TOY, metrics, train_here

LOSSES = ("Training/Loss", "Training/GradNorm", "Training/DistinctEpisodes")


def losses(run):
    return {step: [row[name] for name in LOSSES if name in row] for step, row in metrics(run).items()}


def in_version(monkeypatch, version):
    """New runs begin in this version."""
    tape = Mixture.tape
    monkeypatch.setattr(Mixture, "tape", lambda self, batch_size, wanted=version: tape(self, batch_size, wanted))


@pytest.mark.slow
def test_a_run_of_the_version_before_is_resumed_in_its_own_order(tmp_path, monkeypatch):
    options = [*TOY, "validation.every=0", "checkpoint.every=2", "trainer.log_every=1", "logger=none"]
    with monkeypatch.context() as patched:
        in_version(patched, 2)
        whole = losses(train_here([*options, "trainer.steps=4"], tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoints" / "00000002"
    resumed = losses(train_here([*options, "trainer.steps=4", f"resume.checkpoint={checkpoint}"], tmp_path / "run"))
    assert {step: resumed[step] for step in (3, 4)} == {step: whole[step] for step in (3, 4)}
    now = losses(train_here([*options, "trainer.steps=4"], tmp_path / "now"))
    assert VERSION > 2 and now != whole
