import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opentau_train.config.settings import OptimizerSettings
from opentau_train.optim import Constant, Cosine, Ema, Linear, adamw


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


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.token_embed = nn.Parameter(torch.ones(4, 2))


def test_no_decay_on_norms_biases_and_embeddings():
    net = Net()
    groups = adamw(net, OptimizerSettings(lr=1.0, weight_decay=0.3)).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(net.linear.weight)}
    assert sum(len(g["params"]) for g in groups) == 5


def test_ema_is_the_written_recurrence():
    net = Net()
    ema = Ema(net, 0.9)
    before = ema.average["linear.bias"].clone()
    with torch.no_grad():
        net.linear.bias.fill_(2.0)
    ema.update(net)
    torch.testing.assert_close(ema.average["linear.bias"], 0.9 * before + 0.1 * 2.0)
