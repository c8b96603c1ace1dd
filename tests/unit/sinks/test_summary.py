"""What is told before the first step."""

import re
from pathlib import Path

import pytest

from opentau_train import cli
from opentau_train.composing import compose
from opentau_train.config.settings import load_settings
from opentau_train.errors import UserError
from opentau_train.models.policy import Policy, bind_model
from opentau_train.sinks.summary import PUBLISHED, WIDTH, Facts, start_summary
from tests.program import REPO, TOY, train_here

WORDS = ["+recipe=lerobot", "data.sources.main.root=/a", "optimizer.lr=2e-4", "trainer.steps=1000"]
NAMES = ["run", "policy", "parameters", "device", "batch", "steps", "rate", "memory", "look at"]


def told(*words: str, ranks: int = 1, max_samples: int = 64, num_windows: int = 64_000, **facts) -> dict[str, str]:
    """{name: what the summary says of it}, long lines joined."""
    given = load_settings(cli.compose([*WORDS, *words]))
    defaults = {"device": "cpu", "numbers": "float32", "trains": "all 9 train", "memory": "1 MiB", "num_parameters": 9}
    text = start_summary(
        Facts(
            given,
            Path("/runs/a"),
            **{**defaults, **facts},
            num_ranks=ranks,
            max_samples=max_samples,
            num_windows=num_windows,
        )
    )
    assert max(map(len, text.splitlines())) <= WIDTH and len(text.splitlines()) <= 12
    lines = re.sub(r"\n +", " ", text).splitlines()
    return {name: line.removeprefix(name).strip() for name, line in zip(NAMES, lines, strict=True)}


@pytest.mark.parametrize(("scaling", "rate", "made"), [("sqrt", 1e-4, "sqrt(64 / 256)"), ("linear", 5e-5, "64 / 256")])
def test_the_rate_at_another_batch_and_the_samples_are_told(scaling, rate, made):
    words = [f"optimizer.lr_scaling={scaling}", "optimizer.reference_batch=256", "trainer.global_batch_size=64"]
    lines = told(*words, "trainer.reference_samples=32000", ranks=4, max_samples=8, num_windows=32_000)
    assert lines["rate"] == f"{rate:g} = 0.0002 x {made} at its peak"
    assert lines["batch"] == "64 = 8 samples x 4 ranks x 2 micro-batches"
    assert lines["steps"] == "1,000 = 64,000 samples = 2 passes over the data; the reference's 32,000 samples: step 500"


def test_without_scaling_the_rate_is_as_given():
    lines = told("trainer.global_batch_size=64")
    assert lines["rate"] == "0.0002 at its peak" and lines["batch"] == "64 = 64 samples x 1 rank x 1 micro-batch"


def test_scaling_needs_the_batch_that_the_rate_is_for():
    with pytest.raises(UserError, match="needs the global batch") as refused:
        told("optimizer.lr_scaling=sqrt")
    assert "optimizer.reference_batch=N" in refused.value.remedy


def test_a_policy_from_scratch_is_told_apart_from_one_with_weights():
    assert told()["policy"].startswith("FlowPolicy, a small one trained from scratch (model=act, ")
    assert told(num_parameters=10**9)["policy"].startswith("FlowPolicy, trained from scratch")
    given = told("model.pretrained_path=/weights/a")["policy"]
    assert given == "FlowPolicy, its first weights from pretrained_path=/weights/a"
    assert "vision_encoder=/b" in told("model.vision_encoder=/b", encoders=("vision_encoder",))["policy"]


@pytest.mark.slow
def test_the_options_with_published_weights_are_those_whose_policies_read_them():
    pytest.importorskip("diffusers")
    able = set()
    for file in (REPO / "conf/model").glob("*.yaml"):
        words = [*WORDS, f"model={file.stem}", "data.image_size=[224,224]"]
        policy, _ = bind_model(compose(words)["model"])
        if policy.weight_map is not Policy.weight_map:
            able.add(file.stem.removesuffix("_tiny"))
    assert able == set(PUBLISHED)


def test_curves_are_pointed_to_only_where_there_are_any():
    assert told()["look at"] == "tensorboard --logdir /runs/a, train.log there"
    assert told("logger=none")["look at"] == "train.log there"


def test_a_run_tells_it_and_what_of_its_schedule_does_not_fit_and_steps_at_that_rate(tmp_path, capsys):
    words = ["optimizer.lr=1e-3", "optimizer.lr_scaling=linear", "optimizer.reference_batch=8", "scheduler=constant"]
    words += ["trainer.steps=1", "scheduler.warmup_steps=2", "validation.every=0", "logger=none"]
    run = train_here([w for w in TOY if not w.startswith("scheduler")] + words, tmp_path / "run")
    said = capsys.readouterr().err
    assert re.search(r"^rate +0.0005 = 0.001 x 4 / 8 at its peak$", said, re.M), said
    assert re.search(r"^batch +4 = 4 samples x 1 rank x 1 micro-batch$", said, re.M)
    assert re.search(rf"^run +{re.escape(str(run))}$", said, re.M)
    assert re.search(r"^device +cpu, float32 parameters", said, re.M)
    assert "scheduler.warmup_steps=2: the run of 1 steps ends before the rate's peak" in said
    assert '"Training/LearningRate": 0.00025' in (run / "metrics.jsonl").read_text()
