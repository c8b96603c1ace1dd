"""The flow's loss as a function: gradients in float64, the times at which it is trained, one batch reduced twice."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from opentau_train.errors import UserError
from opentau_train.metrics.sums import Sums, training_row, validation_row
from opentau_train.models.draws import Draws, flow_time
from opentau_train.types import Group
from opentau_train.validation.losses import exact
from tests.program import TOY, metrics, train_here
from tests.unit.models.flow_cases import make_batch, make_policy

STEP = 1e-5


def heavy_tailed(t: float) -> float:
    """The share of u in [0, 1] for which 1 - u - 1.29 (cos(pi u / 2)^2 - 1 + u), which falls, is below t."""
    low, high = 0.0, 1.0
    for _ in range(50):
        u = (low + high) / 2
        above = 1 - u - 1.29 * (math.cos(math.pi * u / 2) ** 2 - 1 + u) > t
        low, high = (u, high) if above else (low, u)
    return 1 - low


CDF = {
    "uniform": lambda t: t,
    "beta": lambda t: max(0.0, (t - 0.001) / 0.999) ** 1.5,
    "logit_normal": lambda t: NormalDist().cdf(math.log(t / (1 - t))),
    "heavy_tailed": heavy_tailed,
}


class DoubleDraws(Draws):
    def normal(self, name, shape=()):
        return super().normal(name, shape).double()

    def uniform(self, name, shape=()):
        return super().uniform(name, shape).double()


def loss_of(policy, batch) -> torch.Tensor:
    terms = policy(batch, DoubleDraws(batch.key))
    return sum(policy.loss_weights[k] * s.sum() / c.sum() for k, (s, c) in terms.items())


def test_gradients_are_the_losses_slopes_in_float64(monkeypatch):
    """By central differences along a random direction of each parameter, everything in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what is computed in float32, here in float64
    policy = make_policy().double()
    batch = make_batch().each(lambda t: t.double() if t.dtype == torch.float32 else t)
    loss_of(policy, batch).backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        losses = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * STEP * direction
                losses.append(float(loss_of(policy, batch)))
            parameter += STEP * direction
        slope = (losses[0] - losses[1]) / (2 * STEP)
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("distribution", CDF)
def test_times_have_their_density(distribution):
    times = flow_time(Draws(torch.arange(100_000)), distribution)
    assert times.dtype == torch.float32 and float(times.min()) >= 0 and float(times.max()) <= 1
    edges = [k / 20 for k in range(1, 20)]
    below = [0.0, *map(CDF[distribution], edges), 1.0]
    counts = np.histogram(times.double().numpy(), [0.0, *edges, 1.0])[0]
    expected = np.diff(below) * len(times)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 20 + 4 * math.sqrt(40) > chi2, "20 bins: four deviations above their mean"


@pytest.mark.slow
def test_a_policy_is_trained_at_the_times_that_it_names(tmp_path):
    words = [*TOY, "trainer.steps=1", "validation.every=0", "logger=none"]
    losses = {}
    for time in CDF:
        run = train_here([*words, f"model.time={time}"], tmp_path / time)
        losses[time] = metrics(run)[1]["Training/MSE"]
    assert len(set(losses.values())) == len(CDF)
    assert metrics(train_here(words, tmp_path / "default"))[1]["Training/MSE"] == losses["uniform"]
    with pytest.raises(UserError, match=r"model\.time"):
        train_here([*words, "model.time=normal"], tmp_path / "wrong")


def test_training_and_validation_reduce_one_batch_to_the_same_means():
    policy, batch = make_policy().eval(), make_batch(num=6)
    with torch.no_grad():
        terms = policy(batch, Draws(batch.key))
    names, group = tuple(policy.loss_weights), torch.tensor([0, 1, 1, 0, 1, 0])
    groups = tuple(Group("set", mode, "arm::joint", share) for mode, share in (("joint", 1.0), ("ee", 1.0)))
    trained, episodes = Sums(2, names), Sums(6, names)
    trained.add(group, terms)
    episodes.add(torch.arange(6), exact(terms))  # each sample an episode of its own
    training = training_row(trained.values.numpy(), groups, names, policy.loss_weights)
    validation = validation_row(episodes.values.numpy(), group.numpy(), np.ones(6), groups, names, policy.loss_weights)
    tags = [tag.removeprefix("Training/") for tag in training if any(g.tag in tag for g in groups)]
    assert len(tags) == 4
    for tag in tags:
        assert validation[f"Validation/{tag}"] == pytest.approx(training[f"Training/{tag}"], rel=1e-6), tag
