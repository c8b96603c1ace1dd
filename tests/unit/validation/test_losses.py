"""The pass over the losses: how many draws of the noise a window gets, and in which mode the policy is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from opentau_train.models.draws import Draws
from opentau_train.types import Group
from opentau_train.validation.evaluator import Totals, evaluating
from opentau_train.validation.losses import check_conservation, evaluate

KEYS = torch.arange(6) * 7919 + 3


class Noisy:
    """A policy whose loss is the square of the one number that it draws for a sample."""

    loss_weights = {"mse": 1.0}  # noqa: RUF012 (a stand-in)

    def __call__(self, batch, draws):
        return {"mse": (draws.normal("noise").square().double(), torch.ones(len(batch.key)))}

    def term_counts(self, batch):
        return {"mse": torch.ones(len(batch.key))}


def plan_of(num):
    """A plan of `num` episodes of one window each."""
    return SimpleNamespace(
        group_of=np.zeros(num, int),
        item=np.arange(num),
        num_windows=np.ones(num, int),
        episodes=[("a", number) for number in range(num)],
        mixture=SimpleNamespace(groups=[Group("a", "joint", "r::joint", 1.0)]),
    )


def pass_over(keys, num_noise_draws):
    """The row of a pass over the samples `keys`, each an episode of its own, in one batch."""
    num = len(keys)

    def measure(visit, sums):
        visit(SimpleNamespace(key=keys), np.arange(num))
        return Totals(sums, ())

    settings = SimpleNamespace(num_noise_draws=num_noise_draws, on_bad_sample="raise")
    return evaluate(
        SimpleNamespace(policy=Noisy(), plan=plan_of(num), settings=settings, measure=measure), "Validation"
    ).row


@pytest.mark.parametrize("num", [1, 2, 5])
def test_a_window_gets_as_many_draws_of_the_noise_as_were_asked_for_each_another_one(num):
    losses = [Draws(KEYS, draw).normal("noise").square() for draw in range(num)]
    assert len(np.unique(torch.stack(losses))) == num * len(KEYS)
    assert pass_over(KEYS, num)["Validation/Loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


@pytest.mark.parametrize("was_training", [True, False])
def test_a_policy_is_validated_without_dropout_and_then_in_the_mode_that_it_was_in(was_training):
    policy, resharded = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train(was_training), []
    with evaluating(policy, SimpleNamespace(reshard=lambda: resharded.append(True))):
        assert not any(module.training for module in policy.modules())
    assert resharded and all(module.training is was_training for module in policy.modules())


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("what", ["windows", "loss elements"])
def test_what_is_counted_twice_or_not_at_all_is_an_error(what, off):
    sums, expected, windows = np.ones((3, 1, 2)), np.ones((3, 1)), np.ones(3)
    check_conservation(plan_of(3), sums, expected, windows, ())
    (windows if what == "windows" else sums[:, 0, 1])[1] += off
    with pytest.raises(RuntimeError, match=f"counted {3 + off} {what} in a/joint, 3 were planned; first in episode 1"):
        check_conservation(plan_of(3), sums, expected, windows, ())
