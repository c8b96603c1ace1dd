import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opentau_train import cli
from opentau_train.config.optimizer import OptimizerSettings
from opentau_train.config.settings import load_settings
from opentau_train.config.typed import build
from opentau_train.errors import UserError
from opentau_train.models.average import Ema, power_of
from opentau_train.optim import (
    Constant,
    Cosine,
    Linear,
    WarmupStableDecay,
    build_optimizer,
    check_optimizer,
    schedule_warnings,
    set_lr,
)
from tests.unit.models.flow_cases import make_policy


@given(st.integers(0, 50), st.integers(52, 500), st.floats(0, 1))
def test_schedules_warm_up_peak_and_end_where_they_say(warmup, steps, final):
    for schedule in (Cosine(warmup, final), Linear(warmup, final)):
        assert schedule(steps - 1, steps) == pytest.approx(final, abs=1e-6)
        assert schedule(warmup, steps) == pytest.approx(1.0)
        assert max(schedule(s, steps) for s in range(steps)) <= 1.0 + 1e-12
    assert Constant(warmup)(steps, steps) == 1.0
    if warmup:
        assert Cosine(warmup)(0, steps) == pytest.approx(1 / warmup)


def test_one_step_run_has_a_finite_rate():
    assert Cosine(0)(0, 1) == 1.0 and Cosine(5)(0, 1) == pytest.approx(0.2)
    assert Cosine(50)(50, 51) == Linear(50)(50, 51) == 1.0  # one step after the warm-up: the peak and the end


def test_a_cycle_longer_than_the_run_is_followed_and_not_finished():
    """Cosmos's DROID run: 10,000 steps of a line of 100,000."""
    line = Linear(cycle_steps=100_001)
    assert [line(s, 10_000) for s in (0, 5_000, 9_999)] == pytest.approx([1.0, 0.95, 0.90001])
    assert Cosine(cycle_steps=11)(5, 6) == pytest.approx(Cosine()(5, 11)) != pytest.approx(Cosine()(5, 6))
    assert Linear(final_ratio=0.5, cycle_steps=5)(9, 10) == 0.5, "a shorter one ends at its lowest rate"


@given(st.integers(0, 20), st.integers(1, 20), st.integers(60, 500), st.floats(0, 1))
def test_warm_up_then_stable_then_decay(warmup, decay, steps, final):
    rates = [WarmupStableDecay(decay, warmup, final)(s, steps) for s in range(steps)]
    assert rates[warmup : steps - decay] == [1.0] * (steps - decay - warmup)
    assert rates[-1] == pytest.approx(final) and all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :]))
    assert rates[:warmup] == pytest.approx([(s + 1) / warmup for s in range(warmup)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_steps": 10}, "ends before the rate's peak"),
        ({"warmup_steps": 2, "cycle_steps": 4}, "6 of 10 steps stay at the lowest rate"),
        ({"warmup_steps": 5, "decay_steps": 6}, "overlap"),
    ],
)
def test_what_of_a_schedule_does_not_go_with_the_run_is_told(options, words):
    (line,) = schedule_warnings(options, 10)
    assert words in line
    assert not schedule_warnings({"warmup_steps": 5, "decay_steps": 5, "cycle_steps": None}, 10)
    assert not schedule_warnings({"warmup_steps": 0, "cycle_steps": 100}, 10)


# ---------------------------------------------------------------- groups of parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.token_embed = nn.Parameter(torch.ones(4, 2))
        self.velocity_out = nn.Linear(2, 2)
        self.frozen_out = nn.Linear(2, 2).requires_grad_(False)


def settings(**tree) -> OptimizerSettings:
    return build(OptimizerSettings, {"lr": 1.0, "weight_decay": 0.3, **tree}, "optimizer")


def by_name(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """{parameter's name: its group}."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_no_decay_on_norms_biases_and_embeddings_and_none_of_it_on_frozen_parameters():
    net = Net()
    optimizer = build_optimizer(net, settings())
    groups = by_name(net, optimizer)
    assert {name for name, group in groups.items() if group["weight_decay"]} == {"linear.weight", "velocity_out.weight"}
    assert set(groups) == {name for name, p in net.named_parameters() if p.requires_grad}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert type(optimizer) is torch.optim.AdamW and all(g["fused"] and g["lr"] == 1.0 for g in optimizer.param_groups)


def test_the_defaults_train_bit_for_bit_as_two_groups_written_by_hand():
    """The settings of conf/, an old run's without `_target_`, and torch's class over the two groups."""
    shown = load_settings(cli.compose(["+recipe=lerobot", "data.sources.main.root=/a", "optimizer=adamw"])).optimizer
    old = build(
        OptimizerSettings, {"lr": shown.lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-4}, "optimizer"
    )
    policies = [make_policy() for _ in range(3)]
    decayed = [p for n, p in policies[2].named_parameters() if p.ndim > 1 and "embed" not in n]
    plain = [p for n, p in policies[2].named_parameters() if p.ndim <= 1 or "embed" in n]
    by_hand = [{"params": decayed, "weight_decay": 1e-4}, {"params": plain, "weight_decay": 0.0}]
    optimizers = [build_optimizer(policies[0], shown), build_optimizer(policies[1], old)]
    optimizers.append(torch.optim.AdamW(by_hand, lr=shown.lr, betas=(0.9, 0.95), eps=1e-8, fused=True))
    for step in range(3):
        for policy, optimizer in zip(policies, optimizers, strict=True):
            torch.manual_seed(step)
            for parameter in policy.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    for parameters in zip(*(p.parameters() for p in policies), strict=True):
        assert torch.equal(parameters[0], parameters[2]) and torch.equal(parameters[1], parameters[2])


def test_rules_accumulate_in_order_and_the_schedule_keeps_their_ratios():
    net = Net()
    rules = {"heads": {"pattern": "*_out.*", "lr_scale": 5.0}, "bias": {"pattern": "*.bias", "weight_decay": 0.1}}
    rules["last"] = {"pattern": "velocity_out.weight", "weight_decay": 0.7, "betas": [0.5, 0.6]}
    optimizer = build_optimizer(net, settings(groups=rules))
    set_lr(optimizer, 0.01)
    groups = by_name(net, optimizer)
    found = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert found["velocity_out.bias"] == (0.05, 0.1) and found["velocity_out.weight"] == (0.05, 0.7)
    assert found["linear.weight"] == (0.01, 0.3) and found["norm.weight"] == (0.01, 0.0)
    assert groups["velocity_out.weight"]["betas"] == [0.5, 0.6] and groups["linear.weight"]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (
            {"groups": {"heads": {"pattern": "*_outt.*"}}},
            ["optimizer.groups.heads.pattern", "velocity_out", "*_outt.*"],
        ),
        ({"groups": {"a": {"pattern": "frozen_out.*"}}}, ["no trainable parameter", "has 7, such as token_embed"]),
        ({"groups": {"a": {"pattern": "*", "bets": [0.5, 0.6]}}}, ["optimizer.groups.a", "'bets'", "mean 'betas'"]),
    ],
)
def test_a_rule_that_does_nothing_is_refused(tree, words):
    with pytest.raises(UserError) as caught:
        build_optimizer(Net(), settings(**tree))
    assert all(word in str(caught.value) for word in words), caught.value


# ---------------------------------------------------------------- optimizers by their class


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"bets": [0.9, 0.95]}, ["unknown key 'optimizer.bets'", "mean 'betas'", "groups, lr, no_decay"]),
        ({"no_deccay": ["*"]}, ["unknown key 'optimizer.no_deccay'", "mean 'no_decay'"]),
        ({"betas": [0.9, 1.0]}, ["refuses its options", "beta"]),
        ({"betas": 0.9}, ["optimizer.betas must be a list"]),
        ({"_target_": "torch.optim.Adamm"}, ["optimizer._target_", "Adamm"]),
        ({"_target_": "torch.optim.SGD", "momentum": -1.0}, ["torch.optim.SGD refuses", "momentum"]),
    ],
)
def test_a_wrong_option_is_named_before_there_is_a_model(tree, words):
    with pytest.raises(UserError) as caught:
        check_optimizer(settings(**tree))
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_optimizer_of_torch_needs_only_its_name():
    net = Net()
    optimizer = build_optimizer(net, settings(_target_="torch.optim.SGD", momentum=0.9, no_decay=["linear.*"]))
    assert type(optimizer) is torch.optim.SGD and {g["momentum"] for g in optimizer.param_groups} == {0.9}
    assert by_name(net, optimizer)["linear.weight"]["weight_decay"] == 0.0


def muon() -> OptimizerSettings:
    return load_settings(cli.compose(["+recipe=lerobot", "data.sources.main.root=/a", "optimizer=muon"])).optimizer


def test_muon_moves_the_layers_matrices_and_adamw_everything_else():
    """With the settings of conf/optimizer/muon, against torch's two optimizers, each over its part."""
    policy, by_hand = make_policy(), make_policy()
    optimizer = build_optimizer(policy, muon())
    named = dict(by_hand.named_parameters())
    matrices = [p for name, p in named.items() if name.startswith("layers.") and p.ndim == 2]
    rest = [(n, p) for n, p in named.items() if not (n.startswith("layers.") and p.ndim == 2)]
    decayed = [p for n, p in rest if p.ndim > 1 and "embed" not in n]
    plain = [p for n, p in rest if p.ndim <= 1 or "embed" in n]
    lr, decay = muon().lr, muon().weight_decay
    adamw_groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    pair = (
        torch.optim.Muon(matrices, lr=lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw_groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True),
    )
    assert len(matrices) == 8
    for step in range(3):
        for model in (policy, by_hand):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for half in pair:
            half.step()
    for (name, own), other in zip(policy.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(own, other), name
    state = optimizer.state_dict()
    assert sum("momentum_buffer" in s for s in state["state"].values()) == 8


# ---------------------------------------------------------------- the moving average


def test_ema_is_the_written_recurrence_over_trainable_parameters_alone():
    net = Net()
    ema = Ema(net, 0.9)
    assert set(ema.average) == {name for name, p in net.named_parameters() if p.requires_grad}
    before = {name: value.clone() for name, value in ema.average.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    ema.update(net, step=0)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ema.average[name], 0.9 * before[name] + 0.1 * parameter.detach())
            one_by_one = before[name].lerp_(parameter.detach().float(), 1.0 - 0.9)
            assert torch.equal(ema.average[name], one_by_one), "as each parameter by itself, to the last bit"
    frozen = net.frozen_out.weight.clone()
    with ema.applied_to(net):
        assert torch.equal(net.linear.weight, ema.average["linear.weight"])
        assert torch.equal(net.frozen_out.weight, frozen)


class Peak(TorchDispatchMode):
    """Follows the memory of the tensors made inside; `most` is how much of it there was at once, in bytes, besides that
    of the tensors `there`."""

    def __init__(self, there):
        super().__init__()
        self.there = {tensor.untyped_storage()._cdata for tensor in there}
        self.seen, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (value.untyped_storage() for value in tree_leaves(out) if isinstance(value, torch.Tensor)):
            if storage._cdata not in self.there:
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for reference, size in self.seen.values() if not reference.expired()))
        return out


def test_moving_the_average_takes_the_memory_of_a_part_of_it():
    net = nn.ModuleList(nn.Linear(20, 20, bias=False) for _ in range(256))
    ema = Ema(net, 0.9)
    before = [value.clone() for value in ema.average.values()]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    with Peak([*net.parameters(), *ema.average.values()]) as peak:
        ema.update(net, torch.tensor(True), step=0)
    for old, parameter, new in zip(before, net.parameters(), ema.average.values(), strict=True):
        assert torch.equal(new, torch.lerp(old, parameter.detach(), 1.0 - 0.9))
    assert 0 < peak.most < 0.5 * sum(value.nbytes for value in before)


def test_the_power_average_is_as_wide_as_it_says_whenever_it_is_looked_at():
    """Weights of the steps, by putting 1 in at one of them and 0 at the others; their deviation over N."""
    net = nn.Linear(1, 200, bias=False)
    ema = Ema(net, sigma_rel=0.1)
    for step in range(200):
        with torch.no_grad():
            net.weight.copy_(torch.eye(200)[step][:, None])
        ema.update(net, step=step)
        if step in (99, 199):
            weights = ema.average["weight"][: step + 1, 0].double()
            places = torch.arange(1.0, step + 2, dtype=torch.float64)
            mean = float((weights * places).sum())
            assert float(weights.sum()) == pytest.approx(1.0)
            assert float(weights @ (places - mean).square()) ** 0.5 / (step + 1) == pytest.approx(0.1, rel=0.02)
    assert power_of(0.1) == pytest.approx(6.94, abs=0.01)  # Karras et al. 2024, table of EMA widths


def test_two_averages_are_refused():
    words = ["+recipe=lerobot", "data.sources.main.root=/a", "trainer.ema_decay=0.9", "trainer.ema_sigma_rel=0.1"]
    with pytest.raises(UserError, match="two averages") as refused:
        load_settings(cli.compose(words))
    assert "trainer.ema_decay=null" in refused.value.remedy
    assert load_settings(cli.compose([*words, "trainer.ema_decay=null"])).trainer.ema_sigma_rel == 0.1
