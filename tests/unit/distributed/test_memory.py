"""The memory of a rank by arithmetic is what tensors really take."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from opentau_train import cli
from opentau_train.config.optimizer import OptimizerSettings, ParameterRule
from opentau_train.config.settings import Settings, load_settings
from opentau_train.data.fields import FIELDS
from opentau_train.distributed import memory
from opentau_train.distributed.memory import footprint, remedies
from opentau_train.distributed.rehearsal import Rehearsal, kept_for_backward
from opentau_train.models.act import ActPolicy
from opentau_train.models.average import Ema
from opentau_train.models.draws import Draws, _normal_table
from opentau_train.models.flow import FlowPolicy
from opentau_train.optim import build_optimizer
from tests import rehearse_once
from tests.nightly import at_night, by_day
from tests.program import TOY, train_here
from tests.unit.models.flow_cases import SPEC, make_batch
from tests.unit.models.test_diffusion import make_diffusion

WITH_FIELDS = replace(SPEC, fields=make_batch().fields[len(FIELDS) :])
FLOW = partial(FlowPolicy, width=32, depth=2, heads=2, patch_size=8, stem_channels=8, max_prompt_bytes=32)
ACT = partial(ActPolicy, width=32, heads=2, feedforward=48, vae_depth=1, encoder_depth=2)
DIFFUSION = partial(make_diffusion, down_dims=(16,))
ADAMW = OptimizerSettings(lr=1e-3)
SGD = OptimizerSettings(lr=1e-3, target="torch.optim.SGD", options={"momentum": 0.9})
MUON = OptimizerSettings(
    lr=1e-3,
    target="opentau_train.optim.MuonAdamW",
    groups={"layers": ParameterRule("*layers.*", options={"muon": True})},
)


@pytest.fixture(autouse=True)
def rehearsed_anew():
    """Here it is looked at what a rehearsal says, each time."""
    rehearse_once.forget()
    yield
    rehearse_once.remember()


@pytest.fixture(scope="module")
def settings() -> Settings:
    """Of a run of 8 samples a step."""
    return load_settings(cli.compose([*TOY, "trainer.global_batch_size=8", "trainer.ema_decay=0.9"]))


def on_meta(make=FLOW, spec=WITH_FIELDS):
    with torch.device("meta"):
        return make(spec)


def step(policy, optimizer):
    batch = make_batch(num=2)
    sum(sums.sum() for sums, _ in policy(batch, Draws(batch.key)).values()).backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", [ADAMW, SGD, MUON], ids=["adamw", "sgd", "muon"])
@pytest.mark.parametrize("make", by_day([FLOW, ACT], FLOW), ids=["flow", "act"])
def test_parameters_gradients_moments_and_average_are_the_bytes_of_the_tensors(make, optimizer, settings):
    policies = on_meta(make), make(WITH_FIELDS)
    for policy in policies:
        next(policy.parameters()).requires_grad_(False)
    foreseen = footprint(Rehearsal(policies[0], WITH_FIELDS, "cpu"), replace(settings, optimizer=optimizer), ranks=1)
    policy = policies[1]
    real = build_optimizer(policy, optimizer)
    step(policy, real)
    kept = [value for state in real.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert foreseen.parameters == sum(t.nbytes for t in (*policy.parameters(), *policy.buffers()))
    assert foreseen.gradients == sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    assert foreseen.moments == sum(value.nbytes for value in kept) > 0
    assert foreseen.average == sum(value.nbytes for value in Ema(policy, 0.9).average.values())
    assert foreseen.gathered == 0 and foreseen.total == sum(foreseen.parts.values())


def test_bfloat16_parameters_take_half_and_their_average_none_less(settings):
    halves = on_meta()
    whole = footprint(Rehearsal(on_meta(), WITH_FIELDS, "cpu"), settings, ranks=1)
    for parameter in halves.parameters():
        parameter.data = parameter.data.bfloat16()
    half = footprint(Rehearsal(halves, WITH_FIELDS, "cpu"), settings, ranks=1)
    counters = 4 * len(list(halves.parameters()))  # AdamW's numbers of steps
    assert 2 * half.parameters == whole.parameters and 2 * half.gradients == whole.gradients
    assert 2 * (half.moments - counters) == whole.moments - counters and half.average == whole.average


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("make", [FLOW, ACT, DIFFUSION], ids=["flow", "act", "diffusion"])
def test_activations_are_what_a_real_forward_keeps(make, num, settings):
    foreseen = Rehearsal(on_meta(make), WITH_FIELDS, "cpu").activations(num, False, False)
    batch = make_batch(num=num)
    assert foreseen == kept_for_backward(make(WITH_FIELDS), batch, Draws(batch.key))


@at_night
@pytest.mark.parametrize("make", [FLOW, ACT], ids=["flow", "act"])
def test_activations_in_bfloat16_are_nearly_those(make):
    """Fakes keep the statistics of GroupNorm, a few numbers, in bfloat16 where the kernel keeps float32."""
    foreseen, _ = Rehearsal(on_meta(make), WITH_FIELDS, "cpu").activations(3, True, False)
    batch = make_batch(num=3)
    with torch.autocast("cpu", torch.bfloat16):
        real, _ = kept_for_backward(make(WITH_FIELDS), batch, Draws(batch.key))
    assert foreseen == pytest.approx(real, rel=2e-3)


class Live(TorchDispatchMode):
    """Follows the memory of all tensors made inside; `now` is what of it is still held."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def now(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def held_after_forward(policy, batch) -> int:
    """Bytes that are there after a forward, besides what was before it, by no hooks of autograd."""
    own = {t.untyped_storage()._cdata for t in (*policy.parameters(), *batch.values.values()) if torch.is_tensor(t)}
    with Live() as live:
        terms = policy(batch, Draws(batch.key))
        loss = sum(sums.sum() for sums, _ in terms.values())
    live.seen = {key: value for key, value in live.seen.items() if key not in own}
    assert loss.requires_grad
    return live.now


def test_activations_are_the_memory_that_a_forward_leaves():
    batch = make_batch(num=4)
    policy = FLOW(WITH_FIELDS)
    Draws(batch.key).normal("actions", (1,))  # its table is there before
    plain, _ = kept_for_backward(policy, batch, Draws(batch.key))
    assert held_after_forward(policy, batch) == pytest.approx(plain, rel=0.01)  # the terms are there too


def test_with_checkpointing_blocks_leave_their_inputs_and_one_is_computed_again():
    batch = make_batch(num=4)
    foreseen, held = [], []
    for depth in (2, 3):
        policy = FLOW(WITH_FIELDS, depth=depth)
        foreseen.append(Rehearsal(on_meta(partial(FLOW, depth=depth)), WITH_FIELDS, "cpu").activations(4, False, False))
        for block in policy.blocks():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        held.append(held_after_forward(policy, batch))
    plain, checkpointed = zip(*foreseen, strict=True)
    block, entry = plain[1] - plain[0], checkpointed[1] - checkpointed[0]
    assert entry == held[1] - held[0] < block / 5
    assert checkpointed[0] == pytest.approx(held[0] + block - entry, rel=0.01)


def test_autocast_holds_its_casts_until_the_forward_is_over_though_blocks_are_checkpointed():
    make = partial(FLOW, width=128, depth=4)
    plain, checkpointed = Rehearsal(on_meta(make), WITH_FIELDS, "cpu").activations(1, True, False)
    policy = make(WITH_FIELDS)
    for block in policy.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    with torch.autocast("cpu", torch.bfloat16):
        held = held_after_forward(policy, make_batch(num=1))
    assert 0.99 * held < checkpointed <= plain and checkpointed < 1.5 * held


def test_shards_divide_what_is_kept_and_micro_batches_keep_whole_gradients(settings):
    def sharded(**changes):
        parallelism = replace(settings.parallelism, data_parallel_replicate_degree=1, data_parallel_shard_degree=-1)
        return replace(settings, parallelism=parallelism, **changes)

    rehearsal = Rehearsal(on_meta(partial(FLOW, depth=3)), WITH_FIELDS, "cpu")
    one, two = footprint(rehearsal, settings, 1), footprint(rehearsal, sharded(), 2)
    for part in ("parameters", "gradients", "moments", "average"):
        assert one.parts[part] / 2 <= two.parts[part] < one.parts[part] * 0.51 + 4096, part
    assert one.samples == 8 and two.samples == 4 and 0 < two.gathered < 3 * one.parameters
    data = replace(settings.data, max_samples_per_batch=1)
    assert footprint(rehearsal, sharded(data=data), 2).gradients == two.gradients + one.gradients
    once = replace(sharded().parallelism, gather_once=True)
    assert footprint(rehearsal, replace(settings, parallelism=once), 2).gathered > two.gathered
    low = replace(settings.trainer, precision="bf16")
    assert footprint(rehearsal, sharded(trainer=low), 2).gathered < two.gathered


@pytest.mark.slow
def test_each_remedy_takes_what_it_says_and_the_number_of_samples_is_the_largest_that_fits(settings):
    rehearsal = Rehearsal(on_meta(), WITH_FIELDS, "cpu")
    now = footprint(rehearsal, settings, 2)
    limit = now.total - 0.4 * now.activations
    proposed = remedies(rehearsal, settings, 2, limit)
    assert proposed.keys() == {
        "parallelism=fsdp",
        "parallelism.activation_checkpointing=true",
        "trainer.precision=bf16",
        "data.max_samples_per_batch=2",
    }
    for argument, foreseen in proposed.items():
        words = [*TOY, "trainer.global_batch_size=8", "trainer.ema_decay=0.9", argument]
        assert footprint(rehearsal, load_settings(cli.compose(words)), 2) == foreseen
        assert foreseen.total < now.total
    assert proposed["data.max_samples_per_batch=2"].total <= limit
    three = replace(settings, data=replace(settings.data, max_samples_per_batch=3))
    assert footprint(rehearsal, three, 2).total > limit


def test_a_cap_on_tokens_bounds_the_activations(settings):
    """Four samples a rank: as many tokens as two and a half padded ones have are held to be three."""
    rehearsal = Rehearsal(on_meta(), WITH_FIELDS, "cpu")
    cap = int(2.5 * rehearsal.policy.padded_tokens)
    capped = replace(settings, data=replace(settings.data, max_num_tokens_after_packing=cap))
    three = replace(settings, data=replace(settings.data, max_samples_per_batch=3))
    assert footprint(rehearsal, capped, 2) == footprint(rehearsal, three, 2)


@pytest.mark.slow
def test_too_small_a_device_is_warned_of_with_what_would_help(settings):
    rehearsal = Rehearsal(on_meta(), WITH_FIELDS, "cpu")
    needs = footprint(rehearsal, settings, 1).total
    assert memory.shortage(rehearsal, settings, 1, int(needs / 0.89)) is None
    warning = memory.shortage(rehearsal, settings, 1, needs)
    assert "more than 90%" in warning and "data.max_samples_per_batch=" in warning and "finetune=lora" in warning
    assert "parallelism=fsdp" not in warning, "there is one rank"
    frozen = on_meta()
    frozen.layers.requires_grad_(False)
    frozen.bins_out.requires_grad_(False)
    assert "lora" not in memory.shortage(Rehearsal(frozen, WITH_FIELDS, "cpu"), settings, 1, needs // 2)


class Reading(FlowPolicy):
    """Its forward reads a number from the device."""

    def forward(self, batch, draws):
        assert batch.weight.sum().item() >= 0
        return super().forward(batch, draws)


class Selecting(FlowPolicy):
    """Computes on what a mask selects, as if padding weren't there."""

    def _velocity(self, tokens):
        exists = torch.ones(tokens.shape[:2], dtype=torch.bool)
        out = torch.zeros(*tokens.shape[:2], self.spec.action_dim)
        return out.index_put((exists,), super()._velocity(tokens[exists]))


def test_what_depends_on_numbers_is_said_to_be_unknown(settings):
    rehearsal = Rehearsal(on_meta(partial(Reading, **FLOW.keywords)), WITH_FIELDS, "cpu")
    foreseen = footprint(rehearsal, settings, 1)
    assert foreseen.activations is None and foreseen.moments > 0
    assert "activations unknown" in str(foreseen) and str(foreseen).startswith("at least ")
    assert "activations can't be known before the first step" in rehearsal.notes["activations"]


def test_a_selection_counts_as_if_all_were_there():
    make = partial(Selecting, **FLOW.keywords)
    foreseen = Rehearsal(on_meta(make), WITH_FIELDS, "cpu").activations(3, False, False)
    batch = make_batch(num=3)
    assert foreseen == kept_for_backward(make(WITH_FIELDS), batch, Draws(batch.key))


class Caching(FlowPolicy):
    """Keeps a tensor of its first forward."""

    seen = None

    def forward(self, batch, draws):
        self.seen = batch.state + 1 if self.seen is None else self.seen
        return super().forward(batch, draws)


def test_the_rehearsal_leaves_no_trace(settings):
    _normal_table.cache_clear()
    policy = Caching(WITH_FIELDS, **FLOW.keywords)
    before = torch.get_rng_state()
    foreseen = footprint(Rehearsal(policy, WITH_FIELDS, "cpu"), settings, 1)
    assert torch.equal(torch.get_rng_state(), before) and foreseen.activations > 0
    assert policy.seen is None and all(p.grad is None and type(p) is nn.Parameter for p in policy.parameters())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in policy.blocks())
    step(policy, build_optimizer(policy, ADAMW))


def test_a_run_says_what_it_will_hold(tmp_path, capsys):
    train_here([*TOY, "trainer.steps=1", "validation.every=0", "checkpoint.every=0"], tmp_path / "run")
    told = " ".join(capsys.readouterr().err.partition("\nmemory ")[2].partition("\nlook at")[0].split())
    assert re.match(r"[\d.]+ MiB a rank: parameters .*activations .* \(4 samples at a time\)$", told), told
