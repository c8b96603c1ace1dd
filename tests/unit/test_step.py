"""An optimizer step: what it reads from the device, what it leaves out, what its ambient randomness depends on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import traceback
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from opentau_train.config.data import BadSampleSettings
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.world import launch
from opentau_train.errors import Fault, UserError
from opentau_train.models.average import Ema
from opentau_train.step import StepSetup, TrainState, check_skipped, check_windows, train_step
from tests.program import TOY, metrics, train_here
from tests.unit.models.flow_cases import make_batch, make_policy

COUNTS = {"mse": 90.0, "ce": 90.0}


@pytest.fixture(scope="module")
def world():
    with launch(device="cpu", precision="no", timeout=60, identity={}) as world:
        yield world


def make_state(optimizer=None, policy=None) -> TrainState:
    policy = policy or make_policy()
    optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, fused=True))
    groups = [{"params": list(policy.parameters()), "lr_scale": 1.0}]
    return TrainState(policy, Replicas(policy, sharded=False), optimizer(groups), Ema(policy, 0.9))


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Parameters, moments and average."""
    found = {name: p.detach() for name, p in state.policy.named_parameters()}
    found |= {f"ema.{name}": value for name, value in state.ema.average.items()}
    for name, p in state.policy.named_parameters():
        found |= {f"{name}.{key}": value for key, value in state.optimizer.state[p].items()}
    return copy.deepcopy(found)


# -- what is read from the device --------------------------------------------------------------------------------------


class Keyed(nn.Module):
    """A policy whose forward takes nothing from the host: a step of it can run where tensors have no values."""

    def __init__(self):
        super().__init__()
        self.loss_weights = {"mse": 1.0}
        self.layer = nn.Linear(4, 4)

    def forward(self, batch, draws):
        errors = (self.layer(batch.actions) - batch.actions).square()
        return {"mse": (errors.sum((1, 2)), torch.ones(len(batch)))}


def test_a_step_reads_nothing_back(world):
    """In a world of tensors without values: whatever asks for one raises."""
    batch = make_batch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = make_state(policy=Keyed())
        fake = batch.replace(actions=torch.empty_like(batch.actions))
        taken = train_step(state, fake, {"mse": 90.0}, 1e-3, StepSetup(world, 2, 1.0, seed=0))
        assert state.step == 1 and len(taken.losses) == 2
        for value in (taken.grad_norm, state.skipped, taken.losses[0][1]["mse"][0], state.ema.average["layer.bias"]):
            with pytest.raises(DataDependentOutputException):
                float(value.flatten()[0])


class Reads(TorchFunctionMode):
    """Counts the calls that make the host wait for a tensor's values, by (the file that makes them, the call)."""

    CALLS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.CALLS:
            frames = [frame.filename for frame in traceback.extract_stack() if "opentau_train/" in frame.filename]
            self.counts[frames[-1].rpartition("opentau_train/")[2], function.__name__] += 1
        return function(*args, **(kwargs or {}))


ON_THE_HOST = {"distributed/consensus.py"}
"""It reads a tensor that was made on the host: the votes' sums."""


def test_a_weight_counts_as_so_many_samples(world):
    """In sums and in denominators: one of weight 3 beside one of 1 trains as three of it beside the other."""
    one, three = make_batch(num=2), make_batch(num=2).rows(torch.tensor([0, 0, 0, 1]))
    one = one.replace(weight=torch.tensor([3.0, 1.0]))
    gradients = []
    for batch in (one, three):
        state = make_state(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
        before = {name: p.detach().clone() for name, p in state.policy.named_parameters()}
        counts = {k: float(n.double() @ batch.weight.double()) for k, n in state.policy.term_counts(batch).items()}
        train_step(state, batch, counts, 1.0, StepSetup(world, 4, None, seed=0))
        gradients.append({name: before[name] - p.detach() for name, p in state.policy.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_average_over_ranks_of_their_gradients_is_that_of_the_global_batch(world):
    """Four samples on one rank, and two and two on each of two, whose gradients DDP or FSDP average."""
    batch = make_batch()
    parts = [batch.rows(torch.tensor(rows)) for rows in ([0, 1, 2, 3], [0, 1], [2, 3])]
    counts = {k: float(n.sum()) for k, n in make_policy().term_counts(batch).items()}
    updates = []
    for rank, part in enumerate(parts):
        state = make_state(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
        own = world if rank == 0 else dataclasses.replace(world, rank=rank - 1, size=2)
        before = {name: p.detach().clone() for name, p in state.policy.named_parameters()}
        train_step(state, part, counts, 1.0, StepSetup(own, 4, None, seed=0))
        updates.append({name: before[name] - p.detach() for name, p in state.policy.named_parameters()})
    for name, update in updates[0].items():
        averaged = (updates[1][name] + updates[2][name]) / 2
        torch.testing.assert_close(averaged, update, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_rank_of_fewer_micro_batches_adds_blank_ones_where_a_forward_is_a_collective(world, sharded):
    """They change no gradient, and the losses of a sample appear once."""
    batch, policy = make_batch(), make_policy(packing=True)
    batch = batch.counted(policy.num_tokens(batch).numpy())  # of 44, 14, 39 and 46 tokens
    weights, forwards = [], []
    policy.register_forward_pre_hook(lambda _, args: forwards.append((args[0].key.tolist(), args[0].weight.tolist())))
    for most in (0, 4):
        forwards.clear()
        state = make_state(policy=copy.deepcopy(policy))
        state.replicas = Replicas(state.policy, sharded=sharded)
        taken = train_step(state, batch, COUNTS, 1e-3, StepSetup(world, 4, None, seed=0, max_tokens=60), most)
        assert taken.rows.tolist() == [0, 1, 2, 3] and len(taken.losses) == 3
        weights.append(everything(state))
    whole = [([0, 1], [1.0, 1.0]), ([2], [1.0]), ([3], [1.0])]
    assert forwards == whole + ([([0], [0.0])] if sharded else [])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0, msg=name)


def test_an_interval_reads_the_device_once(world, tmp_path, monkeypatch):
    """Counted in the loop as it runs, from one step to another: those of an interval, with its row."""
    from opentau_train import loop

    seen: list[Counter] = []
    reads, take = Reads(), loop.train_step

    def counted(state, *arguments):
        seen.append(+reads.counts)
        return take(state, *arguments)

    monkeypatch.setattr(loop, "train_step", counted)
    with reads:
        train_here([*TOY, "trainer.steps=13", "trainer.log_every=4", "validation.every=0"], tmp_path / "run")
    first, last = seen[0], seen[12]  # before steps 1 and 13: three intervals lie between
    # One copy an interval; the two other calls read that copy, on the host.
    assert {call: n for call, n in (last - first).items() if call[0] not in ON_THE_HOST} == {
        ("metrics/meter.py", "cpu"): 3,
        ("metrics/meter.py", "tolist"): 3,
        ("metrics/meter.py", "numpy"): 3,
    }


# -- a gradient that is no number --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.AdamW(p, fused=True), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)],
    ids=["fused", "asked_on_the_host"],
)
def test_a_step_that_is_skipped_moves_no_bit_and_is_counted(optimizer, world):
    state, setup = make_state(optimizer), StepSetup(world, 4, 1.0, seed=0)
    train_step(state, make_batch(), COUNTS, 1e-2, setup)
    before = everything(state)
    hook = next(state.policy.parameters()).register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
    for in_a_row in (1, 2):
        taken = train_step(state, make_batch(), COUNTS, 1e-2, setup)
        assert not torch.isfinite(taken.grad_norm) and state.skipped.tolist() == [in_a_row, in_a_row]
    after = everything(state)
    assert after.keys() == before.keys() and any("exp_avg" in k or "momentum" in k for k in before)
    for name, value in before.items():
        assert value.numpy().tobytes() == after[name].numpy().tobytes(), name
    hook.remove()
    train_step(state, make_batch(), COUNTS, 1e-2, setup)
    assert state.step == 4 and state.skipped.tolist() == [2, 0]
    assert any(not torch.equal(value, everything(state)[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("bad", "seen", "ends"),
    [(4, 8, False), (5, 1000, False), (5, 50, False), (5, 49, True), (6, 59, True), (6, 60, False)],
)
def test_windows_that_cannot_be_read_end_a_run_above_both_limits(bad, seen, ends):
    """More than the grace, and more than the fraction: as many as either allows go on."""
    limits = BadSampleSettings(grace=4, max_fraction=0.1)
    with pytest.raises(UserError, match=f"{bad} of {seen} windows") if ends else contextlib.nullcontext():
        check_windows(bad, seen, limits)


def test_too_many_skipped_in_a_row_stop_the_run_with_the_step():
    check_skipped(7, 2, 3)
    with pytest.raises(Fault, match="not finite in 3 steps in a row") as fault:
        check_skipped(8, 3, 3)
    assert fault.value.where == "step 8"


# -- ambient randomness ------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Shows the mask of its dropout as its losses."""

    def __init__(self):
        super().__init__()
        self.loss_weights = {"mse": 1.0}
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, batch, noise):
        kept = nn.functional.dropout(self.scale.expand(len(batch), -1), 0.5, self.training)
        return {"mse": (kept.sum(1), torch.ones(len(batch)))}


def masks(world, step: int, rank: int, seed: int = 0) -> list[list[float]]:
    """Of two micro-batches: the numbers of elements that the dropout kept for each sample."""
    state = make_state(policy=Dropping())
    state.step = step
    torch.rand(step + rank)  # whatever was drawn before: a validation, say
    setup = StepSetup(dataclasses.replace(world, rank=rank), 2, 1.0, seed)
    taken = train_step(state, make_batch(), {"mse": 4.0}, 1e-3, setup)
    return [terms["mse"][0].tolist() for _, terms in taken.losses]


def test_ambient_randomness_differs_by_seed_step_rank_and_micro_batch_and_by_nothing_else(world):
    seen = [masks(world, *which) for which in ((3, 0), (3, 1), (4, 0), (3, 0, 1))]
    each = [tuple(micro) for run in seen for micro in run]
    assert len(set(each)) == len(each)
    torch.manual_seed(123)
    assert masks(world, 3, 0) == seen[0]


def test_validation_and_a_resume_change_nothing_in_a_policy_with_dropout(tmp_path):
    run = [*TOY, "model._target_=tests.misbehaving.Dropout", "trainer.steps=4", "checkpoint.every=2"]
    run.append("validation.max_samples_per_group=4")
    without = metrics(train_here([*run, "validation.every=0"], tmp_path / "without"))
    train_here([*run, "trainer.steps=2", "validation.every=1", "scheduler=constant"], tmp_path / "halves")
    halves = metrics(train_here([*run, "validation.every=1", "resume=auto", "scheduler=constant"], tmp_path / "halves"))
    whole = metrics(train_here([*run, "validation.every=1", "scheduler=constant"], tmp_path / "whole"))
    assert halves == whole
    assert without[1]["Training/Loss"] == whole[1]["Training/Loss"]
    assert without[1]["Training/Loss"] != without[2]["Training/Loss"]
