"""The line that says at the start what a run will do."""

import pytest

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.errors import UserError
from opentau_train.metrics.budget import budget
from tests.program import TOY, train_here

WORDS = ["+recipe=lerobot", "data.sources.main.root=/a", "optimizer.lr=2e-4", "trainer.steps=1000"]


def settings(*words: str):
    return load_settings(cli.compose([*WORDS, *words]))


@pytest.mark.parametrize(("scaling", "rate", "made"), [("sqrt", 1e-4, "sqrt(64 / 256)"), ("linear", 5e-5, "64 / 256")])
def test_the_rate_at_another_batch_and_the_samples_are_told(scaling, rate, made):
    words = [f"optimizer.lr_scaling={scaling}", "optimizer.reference_batch=256", "trainer.global_batch_size=64"]
    given = settings(*words, "trainer.reference_samples=32000")
    assert given.optimizer.rate(64) == pytest.approx(rate)
    line = budget(given, ranks=4, max_samples=8, num_windows=32_000)
    assert f"learning rate {rate:g} = 0.0002 x {made}; batch 64 = 8 samples x 4 ranks x 2 micro-batches" in line
    assert "1,000 steps = 64,000 samples = 2 epochs; the reference's 32,000 samples: step 500" in line


def test_without_scaling_the_rate_is_as_given():
    line = budget(settings("trainer.global_batch_size=64"), ranks=1, max_samples=64, num_windows=64_000)
    assert line.startswith("learning rate 0.0002; batch 64 = 64 samples x 1 ranks x 1 micro-batches; 1,000 steps")


def test_scaling_needs_the_batch_that_the_rate_is_for():
    with pytest.raises(UserError, match="needs the global batch") as refused:
        settings("optimizer.lr_scaling=sqrt")
    assert "optimizer.reference_batch=N" in refused.value.remedy


def test_a_run_tells_it_and_what_of_its_schedule_does_not_fit_and_steps_at_that_rate(tmp_path, capsys):
    words = ["optimizer.lr=1e-3", "optimizer.lr_scaling=linear", "optimizer.reference_batch=8", "scheduler=constant"]
    words += ["trainer.steps=1", "scheduler.warmup_steps=2", "validation.every=0", "logger=none"]
    run = train_here([w for w in TOY if not w.startswith("scheduler")] + words, tmp_path / "run")
    told = capsys.readouterr().err
    assert "learning rate 0.0005 = 0.001 x 4 / 8; batch 4 = 4 samples x 1 ranks" in told
    assert "scheduler.warmup_steps=2: the run of 1 steps ends before the rate's peak" in told
    assert '"Training/LearningRate": 0.00025' in (run / "metrics.jsonl").read_text()
