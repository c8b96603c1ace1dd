"""Packed tokens: losses and gradients are those of padded ones, micro-batches keep to their caps, the start tells."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from opentau_train import cli
from opentau_train.data.batch import Batch, blank_batch
from opentau_train.data.load.arrival import arrivals
from opentau_train.data.load.stream import RankBatch
from opentau_train.data.mixture.open import open_plan
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.data.transforms.pipeline import meet
from opentau_train.distributed.rehearsal import BlankDraws
from opentau_train.errors import UserError
from opentau_train.models.draws import Draws
from opentau_train.models.packing.attention import Packing
from opentau_train.models.packing.cut import first_fit, micro_batches
from opentau_train.models.packing.limits import check_cap, prompts_of, sketched
from opentau_train.models.policy import Policy
from tests.program import TOY, metrics, train_here
from tests.unit.models import flow_cases, pi_cases, wam_cases

CPU = torch.device("cpu")
SMALL_PICTURES = ["model.vision.image_size=32", "model.vision.patch_size=8"]
PI = [*[word for word in TOY if not word.startswith("model.")], *SMALL_PICTURES]
WAM = [*TOY, "model=wam_tiny", "data.future.num_frames=2"]
INSULATED = {**pi_cases.TOKENS, "insulate": True}


def flow(**changes: Any) -> tuple[Policy, Batch, Any]:
    policy, batch = flow_cases.make_policy(**changes), flow_cases.make_batch()
    return policy, batch, flow_cases.make_noise(batch)


def pi(make: Callable[..., Any], **changes: Any) -> tuple[Policy, Batch, Any]:
    policy = make(**changes)
    return policy, pi_cases.make_batch(policy), pi_cases.Given(policy, 4)


def wam(**changes: Any) -> tuple[Policy, Batch, Any]:
    policy, batch = wam_cases.make_policy(**changes), wam_cases.make_batch()
    return policy, batch, Draws(batch.key)


CASES = {
    "flow": flow,
    "wam": wam,
    "flow_without_cameras": lambda **more: flow_of(dataclasses.replace(flow_cases.SPEC, cameras=()), **more),
    "pi0": functools.partial(pi, pi_cases.make_pi0),
    "pi0_tokens": functools.partial(pi, pi_cases.make_pi0, **pi_cases.TOKENS),
    "pi05": functools.partial(pi, pi_cases.make_pi05),
    "pi05_insulated": functools.partial(pi, pi_cases.make_pi05, **INSULATED),
}


def flow_of(spec, **changes):
    policy, batch = flow_cases.make_policy(spec, **changes), flow_cases.make_batch(spec)
    return policy, batch, flow_cases.make_noise(batch)


def packed(policy: Policy, batch: Batch) -> Batch:
    return batch.counted(policy.num_tokens(batch).numpy())


def lost(policy: Policy, batch: Batch, draws) -> tuple[dict, dict]:
    """The terms, and the gradients of the sum of all sums."""
    policy.zero_grad()
    terms = policy(batch, draws)
    sum(sums.sum() for sums, _ in terms.values()).backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return {name: (s.detach(), c) for name, (s, c) in terms.items()}, gradients


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_packed_samples_lose_what_padded_ones_lose_and_have_the_same_gradients(case):
    """Samples without cameras, state, prompt, the last steps, the last dims; prompts of all lengths."""
    policy, batch, draws = CASES[case](packing=True)
    (terms, gradients), (padded, expected) = (lost(policy, b, draws) for b in (packed(policy, batch), batch))
    for name, (sums, counts) in padded.items():
        torch.testing.assert_close(terms[name][0], sums, rtol=1e-5, atol=1e-6)
        assert torch.equal(terms[name][1], counts)
    assert gradients.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_is_missing_is_computed(case):
    """The blocks see as many tokens as are counted, fewer than padding takes."""
    policy, batch, draws = CASES[case](packing=True)
    seen = []
    block = policy.layers[0]
    block.register_forward_pre_hook(lambda _, args: seen.append(sum(t.shape[1] for t in first_tensors(args))))
    policy(packed(policy, batch), draws)
    assert seen == [int(policy.num_tokens(batch).sum())] and seen[0] < len(batch) * policy.padded_tokens
    policy(batch, draws)
    assert seen[1] * len(batch) == len(batch) * policy.padded_tokens


def first_tensors(args: tuple) -> list[torch.Tensor]:
    """The tokens among a block's arguments: flow's are a tensor, pi's two `Tokens`."""
    return [args[0]] if isinstance(args[0], torch.Tensor) else [args[0].x, args[1].x]


@pytest.mark.parametrize("case", ["flow", "wam", "pi0_tokens", "pi05", "pi05_insulated"])
def test_a_sample_of_which_nothing_exists_gives_every_parameter_a_gradient(case):
    """DDP waits for all of them."""
    policy, _, _ = CASES[case](packing=True)
    blank = blank_batch(meet(policy.spec, policy.wants()))
    draws = pi_cases.Given(policy, 1) if case.startswith("pi") else Draws(blank.key)
    terms, gradients = lost(policy, packed(policy, blank), draws)
    assert gradients.keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all(float(s) == 0.0 for s, _ in terms.values()) and not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("case", ["flow", "wam", "pi0_tokens", "pi05"])
def test_sampling_is_untouched(case):
    chunks = []
    for packing in (False, True):
        policy, batch, draws = CASES[case](packing=packing)
        chunks.append(policy.sample_actions(batch, draws))
    assert torch.equal(*chunks)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["flow", "wam", "pi0_tokens", "pi05"])
def test_a_packed_forward_asks_the_device_for_nothing(case):
    """With tensors that have no numbers: all that it must know, the counts on the host tell."""
    policy, batch, _ = CASES[case](packing=True)
    counts = policy.num_tokens(batch).numpy()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = batch.each(lambda tensor: mode.from_tensor(tensor)).counted(counts)
        terms = policy(fake, BlankDraws(fake.key))
    assert all(sums.shape == (4,) for sums, _ in terms.values())


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=5), st.booleans())
def test_the_kernels_plan_is_the_attention_sample_by_sample(lengths, causal):
    """Of three parts: who sees whom, by the sequences that a card's kernel is given, computed here one by one."""
    lengths = np.array([(prefix + 1, *rest) for prefix, *rest in lengths])
    valid = [torch.arange(6).expand(len(lengths), 6) < torch.from_numpy(n)[:, None] for n in lengths.T]
    packing = Packing(valid, lengths)
    attention = packing.attention({1: (0, 1), 0: (0,), 2: (0, 2)}, causal=(2,) if causal else ())
    torch.manual_seed(0)
    q = torch.randn(1, 4, packing.num(1, 0, 2), 8)
    k, v = (torch.randn(1, 2, packing.num(0, 1, 2), 8) for _ in range(2))
    made = []
    for part, queries in zip((1, 0, 2), q.split([packing.num(part) for part in (1, 0, 2)], dim=2), strict=True):
        index, starts_q, starts_k = attention._plan[part]
        keys, values = k[:, :, index], v[:, :, index]
        for i in range(len(lengths)):
            mine, theirs = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
            num, of = mine.stop - mine.start, theirs.stop - theirs.start
            later = torch.ones(num, of, dtype=torch.bool).tril(of - num) if causal and part == 2 else None
            # By groups of heads, as the kernel does it.
            args = queries[:, :, mine], keys[:, :, theirs], values[:, :, theirs], later
            made.append(F.scaled_dot_product_attention(*args, enable_gqa=True))
    torch.testing.assert_close(attention(q, k, v, None), torch.cat(made, dim=2))


# -- micro-batches -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 8), st.integers(50, 120))
def test_first_fit_takes_every_sample_once_in_order_within_both_caps(tokens, samples, cap):
    cut = first_fit(tokens, samples, cap)
    assert sorted(row for rows in cut for row in rows) == list(range(len(tokens)))
    for number, rows in enumerate(cut):
        assert rows == sorted(rows) and 1 <= len(rows) <= samples and sum(tokens[row] for row in rows) <= cap
        for earlier in cut[:number]:  # there was no room when its first sample came
            before = [row for row in earlier if row < rows[0]]
            assert len(before) == samples or sum(tokens[row] for row in before) + tokens[rows[0]] > cap


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 8))
def test_without_a_cap_micro_batches_are_consecutive(tokens, samples):
    rows = range(len(tokens))
    assert first_fit(tokens, samples, -1) == [list(rows[i : i + samples]) for i in range(0, len(tokens), samples)]


def test_micro_batches_keep_their_counts():
    policy, batch, _ = flow(packing=True)
    counts = policy.num_tokens(batch).numpy()  # 44, 14, 39 and 46 tokens
    rows = micro_batches(batch.counted(counts), 4, 60)
    assert [np.arange(4)[index].tolist() for index in rows] == [[0, 1], [2], [3]]
    rows = micro_batches(batch.counted(counts), 4, 85)
    assert [np.arange(4)[index].tolist() for index in rows] == [[0, 1], [2, 3]] and isinstance(rows[0], slice)
    rows = micro_batches(batch.rows(torch.tensor([0, 3, 1])).counted(counts[[0, 3, 1]]), 4, 60)
    micro = batch.rows(torch.tensor([0, 3, 1])).counted(counts[[0, 3, 1]]).rows(rows[0])
    assert rows[0].tolist() == [0, 2] and micro.key.tolist() == [0, 1]
    assert (micro.num_tokens == counts[[0, 1]]).all() and micro.prompt == [batch.prompt[0], batch.prompt[1]]


# -- a run -------------------------------------------------------------------------------------------------------------

SHORT = ["trainer.steps=4", "validation.every=4", "validation.max_samples_per_group=4", "logger=none"]
CAPPED = ["model.packing=true", "data.max_num_tokens_after_packing=80"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[int, dict[str, float]]]:
    root = tmp_path_factory.mktemp("runs")
    words = [*TOY, *SHORT, "checkpoint.every=2"]
    for name, more in {"padded": [], "capped": CAPPED}.items():
        train_here([*words, *more], root / name)
    train_here([*words, *CAPPED, f"resume={root / 'capped' / 'checkpoints' / '00000002'}"], root / "resumed")
    return {name: metrics(root / name) for name in ("padded", "capped", "resumed")}


@pytest.mark.slow
def test_a_run_trains_alike_packed(runs):
    padded, capped = runs["padded"], runs["capped"]
    for step, row in padded.items():
        for tag in ("Training/Loss", "Training/GradNorm", "Training/BatchId"):
            assert capped[step][tag] == pytest.approx(row[tag], rel=1e-5)
        assert capped[step].keys() - row.keys() == {"Training/PackingEfficiency"}
        assert 0.5 < capped[step]["Training/PackingEfficiency"] <= 1.0
    assert capped[4]["Validation/Loss"] == pytest.approx(padded[4]["Validation/Loss"], rel=1e-5)


@pytest.mark.slow
def test_a_packed_run_goes_on_bit_for_bit(runs):
    for step in (3, 4):
        for tag in ("Training/Loss", "Training/GradNorm", "Training/PackingEfficiency"):
            assert runs["resumed"][step][tag] == runs["capped"][step][tag]


# -- what is told at start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*TOY, "data.max_num_tokens_after_packing=500"], "packs none with these settings"),
        (["model=act_tiny", *TOY[:2], "data.max_num_tokens_after_packing=500"], "data.max_samples_per_batch=8"),
        (["model=act_tiny", *TOY[:2], "model.packing=true"], "unknown key 'model.packing'"),
        (["model=diffusion_tiny", *TOY[:2], "model.packing=true"], "unknown key 'model.packing'"),
        ([*TOY, *CAPPED, "trainer.compile=true"], "set trainer.compile=false"),
        ([*TOY, *CAPPED, "data.max_num_tokens_after_packing=0"], "at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(words, says):
    with pytest.raises(UserError) as refused:
        cli.checked(cli.compose(words))
    assert says in str(refused.value)


@pytest.mark.slow
def test_a_cap_below_a_sample_ends_the_start_and_its_remedy_works(tmp_path):
    words = [*TOY, "trainer.steps=1", "validation.every=0", "logger=none", "model.packing=true"]
    with pytest.raises(UserError) as refused:
        train_here([*words, "data.max_num_tokens_after_packing=43"], tmp_path / "run")
    said = str(refused.value)
    assert "a window of dataset 'main' has up to 44 tokens" in said and not (tmp_path / "run").exists()
    remedy = said.partition("remedy: set ")[2].partition(" ")[0]
    assert remedy == "data.max_num_tokens_after_packing=44"
    train_here([*words, remedy], tmp_path / "run")


def test_a_window_above_the_cap_that_metadata_did_not_tell_of_ends_all_ranks():
    policy, batch, _ = flow(packing=True)
    (arrival,) = arrivals((part for part in [RankBatch(batch)]), policy, CPU, 45)
    assert "dataset 'arm', episode 3, frame 3" in str(arrival.part.error) and "has 46 tokens" in str(arrival.part.error)
    (arrival,) = arrivals((part for part in [RankBatch(batch)]), policy, CPU, 46)
    assert arrival.part.error is None and int(arrival.part.batch.num_tokens.sum()) == 44 + 14 + 39 + 46


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [*TOY, "model.max_prompt_bytes=64", "data.history=1"],
        [*WAM, "data.sources.main.mode=joint", "data.sources.main.mode_probabilities={policy:1,inverse_dynamics:3}"],
        [*PI, "model=pi0_tiny", "model.action_tokens=binned"],
        [*PI, "model=pi05_tiny", "model.max_prompt_tokens=150"],
    ],
)
def test_metadata_tell_the_most_tokens_of_a_window(words, tmp_path):
    """No window of the data has more, and one has as many; a state of three digits a dimension is the longest."""
    from opentau_train.checkpoints.start import new_policy
    from opentau_train.data.load.stream import ShardDataset, TrainPlan
    from opentau_train.data.mixture.open import open_mixture

    settings = cli.checked(cli.compose([*words, f"paths.cache_dir={tmp_path}"]))
    plan = open_plan(settings, resolve_sources(settings))
    policy = new_policy(settings.model, plan.spec, settings.finetune, "no")
    mixture = open_mixture(settings).for_policy(policy.wants())
    tape = mixture.tape(32)
    (shard,) = ShardDataset(mixture, TrainPlan(tape, 0, 1, 0, 1), train=True)
    for dataset in plan.datasets:
        modes = dataset.settings.modes
        windows = [(prompt, dataset.chunk_length, mode) for prompt in prompts_of(dataset) for mode in modes]
        most = policy.num_tokens(sketched(policy, dataset, plan.spec, windows)).max(0).values
        real = policy.num_tokens(shard.batch.rows(shard.batch.dataset_index == dataset.index)).max(0).values
        assert (real <= most).all() and (real - most).abs().max() <= (6 if "model=pi05_tiny" in words else 0)
    check_cap(policy, plan.datasets, plan.spec, -1)
