"""Every policy that ships trains alike in one process and spread over several."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nightly import at_night
from tests.pretrained import drawn
from tests.program import NEEDS_COMPILER, TINY_POLICY, TOY, metrics, train_all, train_here

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]  # several launches a test

LAYOUTS = {
    "ddp_2": (2, []),
    "fsdp_2_checkpointed": (2, ["parallelism=fsdp", "parallelism.activation_checkpointing=true"]),
    "four_micro_batches": (1, ["data.max_samples_per_batch=1"]),
}
NIGHTLY_LAYOUTS = {"fsdp_2": (2, ["parallelism=fsdp"])}
"""Shards that keep their activations: less of what LAYOUTS has. By day test_topology.py has it for the flow policy."""
AOT_EAGER = ["trainer.compile=true", "trainer.compile_backend=aot_eager"]
MORE_LAYOUTS = {
    "aot_eager": (1, AOT_EAGER),
    "fsdp_2_compiled": (2, ["parallelism=fsdp", "parallelism.activation_checkpointing=true", *AOT_EAGER]),
    "hsdp_2x2": (4, ["parallelism=hsdp", "parallelism.data_parallel_shard_degree=2"]),
}
INDUCTOR = {"inductor": (1, ["trainer.compile=true"])}
SIZES = [word for word in TOY if not word.startswith("model.")]
SMALL_PICTURES = ["model.vision.image_size=32", "model.vision.patch_size=8"]
EVEN = "{policy:1,wam:1,forward_dynamics:1,inverse_dynamics:1}"
JOINT = [
    word
    for name in ("main", "old")
    for word in (f"data.sources.{name}.mode=joint", f"data.sources.{name}.mode_probabilities={EVEN}")
]
POLICIES = {
    "act": ["model=act_tiny", "model.dropout=0.0"],
    "diffusion": ["model=diffusion_tiny"],
    "pi0": ["model=pi0_tiny", *SMALL_PICTURES],
    "wam": [
        "model=wam_tiny",
        *TINY_POLICY,
        *JOINT,
        "model.num_flow_steps=2",
        "data.future.num_frames=2",
        "validation.evaluators=[loss,action,video]",
    ],
    "pi05": ["model=pi05_tiny", "model.action_tokens=binned", "model.insulate=true", *SMALL_PICTURES],
}
ALONE = {"alone": (1, [])}
TRAINING = ("Training/Loss", "Training/GradNorm")
SAMPLED = ("Validation-Action", "Validation-Video")


def trained_alike(policies: dict[str, list[str]], layouts: dict[str, tuple[int, list[str]]], root: Path, *more) -> None:
    """Each policy has one process's losses, gradient's norms and validation over 4 steps in all `layouts`; `more` words
    are for all runs. A run's directory is `root`/policy/layout."""
    words = [*SIZES, "trainer.steps=4", "validation.every=4", "validation.max_samples_per_group=4", "logger=none"]
    words += [*more, f"paths.cache_dir={root / 'cache'}"]
    runs = {
        root / policy / layout: (ranks, [*words, *model, *how])
        for policy, model in policies.items()
        for layout, (ranks, how) in (ALONE | layouts).items()
    }
    train_all(runs)
    for run in runs:
        alone, rows = metrics(run.parent / "alone"), metrics(run)
        assert list(rows) == [1, 2, 3, 4] and set(TRAINING) <= rows[4].keys()
        for step, row in alone.items():
            for tag in (t for t in row if t in (*TRAINING, "Validation/Loss") or t.startswith(SAMPLED)):
                assert rows[step][tag] == pytest.approx(row[tag], rel=1e-5), (run, step, tag)


def test_a_policy_trains_alike_in_every_layout(tmp_path):
    """It begins with the weights of a run: each rank reads what it holds."""
    words = [*TOY, "logger=none", "trainer.steps=2", "validation.every=0"]
    first = train_here(words, tmp_path / "first")
    flow = {"flow": [*TINY_POLICY, f"model.pretrained_path={first}"]}
    trained_alike(flow, LAYOUTS, tmp_path)
    for layout in ("alone", *LAYOUTS):
        log = (tmp_path / "flow" / layout / "train.log").read_text()
        assert log.count("tensors, from") == 1, "rank 0 reports"
    losses = [metrics(run)[1]["Training/Loss"] for run in (tmp_path / "flow" / "alone", first)]
    assert losses[0] < 0.99 * losses[1]


def test_shards_that_are_compiled_train_alike(tmp_path):
    compiled = {"fsdp_2_compiled": MORE_LAYOUTS["fsdp_2_compiled"]}
    trained_alike({"flow": TINY_POLICY}, compiled, tmp_path)


@at_night
@pytest.mark.parametrize("policy", POLICIES)
def test_the_other_policies_train_alike_in_every_layout(policy, tmp_path):
    """By day test_packing.py has wam and pi05 on two ranks and in shards, and test_finetune.py has pi0."""
    trained_alike({policy: POLICIES[policy]}, LAYOUTS, tmp_path)


@at_night
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_trains_alike_in_shards_that_keep_their_activations(policy, tmp_path):
    trained_alike({policy: POLICIES[policy]}, NIGHTLY_LAYOUTS, tmp_path)


@at_night
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_pretrained_encoders_train_alike_in_every_layout(frozen, tmp_path):
    encoders = [*TINY_POLICY, *drawn(tmp_path), f"model.freeze_encoders={str(frozen).lower()}"]
    trained_alike({"encoders": encoders}, LAYOUTS, tmp_path)


@at_night
def test_policies_train_alike_compiled_and_on_four_ranks(tmp_path):
    """Five take four minutes. By day test_finetune.py compiles pi0's layers by aot_eager, and test_topology.py has four
    ranks."""
    trained_alike(POLICIES, MORE_LAYOUTS, tmp_path)


@NEEDS_COMPILER
@at_night
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_trains_alike_compiled_by_inductor(policy, tmp_path):
    """Most of the time, a minute or two a policy, goes into tracing and the C++ compiler. A robot alone, unvalidated,
    has one shape of batches to compile for: aot_eager is tried with several. By day shards of the flow policy are
    compiled by aot_eager, which traces the same graphs."""
    trained_alike({policy: POLICIES[policy]}, INDUCTOR, tmp_path, "~data.sources.old", "validation.every=0")
