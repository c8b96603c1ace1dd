"""The certificate: it holds for a run that resumes exactly, and for no other."""

import copy
from types import SimpleNamespace

import pytest

from opentau_train.tools import verify_resume
from opentau_train.tools.verify_resume import compare
from tests import warm
from tests.program import TOY, environment

ROWS = {
    step: {
        "step": step,
        "Training/BatchId": 1000.0 + step,
        "Training/Loss": 2.0 / step,
        "Training/main/default/MSE": 1.0 / step,
        "Training/GradNorm": 3.0,
        "Training/StepTime": 0.1,
    }
    for step in (1, 2, 3)
}


def test_equal_rows_hold_whatever_the_clocks_say():
    found = copy.deepcopy(ROWS)
    for row in found.values():
        row["Training/StepTime"] = 9.0
    comparison = compare(ROWS, found, 3, 1, 0.0)
    assert comparison.holds and "bit for bit" in str(comparison) and comparison.difference == 0.0


BROKEN = {
    "another batch": lambda rows: rows[2].update({"Training/BatchId": 7.0}),
    "a loss": lambda rows: rows[3].update({"Training/main/default/MSE": 0.5}),
    "the gradient": lambda rows: rows[3].update({"Training/GradNorm": 3.1}),
    "not a number": lambda rows: rows[3].update({"Training/Loss": float("nan")}),
    "a step missing": lambda rows: rows.pop(2),
    "a step too many": lambda rows: rows.update({4: rows[3]}),
    "a loss missing": lambda rows: rows[1].pop("Training/Loss"),
    "ids missing": lambda rows: rows[1].pop("Training/BatchId"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_rows_that_differ_or_are_missing_fail_the_certificate(what):
    found = copy.deepcopy(ROWS)
    BROKEN[what](found)
    comparison = compare(ROWS, found, 3, 1, 1e-4)
    assert not comparison.holds and "FAILED" in str(comparison)


def test_a_small_difference_holds_within_its_tolerance():
    found = copy.deepcopy(ROWS)
    found[2]["Training/Loss"] += 1e-5
    assert compare(ROWS, found, 3, 2, 1e-4).holds and not compare(ROWS, found, 3, 1, 0.0).holds
    assert "Training/Loss at step 2" in str(compare(ROWS, found, 3, 2, 1e-4))


@pytest.mark.distributed
def test_a_users_configuration_gets_its_certificate_on_one_and_two_ranks(capsys, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    begun = SimpleNamespace(run=lambda command, env, **captured: warm.run(command, env=env))
    monkeypatch.setattr(verify_resume, "subprocess", begun)
    assert verify_resume.main(["--steps", "5", "--stop", "2", *TOY, "optimizer.lr=1e-3"]) == 0
    said = capsys.readouterr().out
    assert "1 rank : sample ids equal, losses equal bit for bit: ok" in said
    assert "2 ranks: sample ids equal" in said and said.rstrip().endswith("resumes exactly")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "4", "--stop", "4", "+recipe=lerobot"], "--stop 4 must lie between"),
        (["+recipe=lerobot", "resume=auto"], "set by this tool"),
        ([*TOY, "trainer.log_evry=3"], "did you mean 'log_every'"),
    ],
)
def test_mistakes_are_answered_as_the_program_does(arguments, words, capsys, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    assert verify_resume.main(arguments) == 2
    assert words in capsys.readouterr().err
