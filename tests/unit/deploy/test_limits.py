"""A robot isn't told actions that aren't finite, nor, with limits, those far from all that the training had."""

import logging

import numpy as np
import pytest

from opentau_train.deploy.limits import Limits, UnsafeActions
from opentau_train.errors import UserError


@pytest.fixture
def one(policy):
    random = np.random.default_rng(0)
    return {"front": random.integers(0, 256, (64, 96, 3), np.uint8), "state": np.zeros(4), "task": "go"}


@pytest.fixture
def extremes(policy):
    """(smallest, largest) [A'] of the training's actions."""
    stats = policy.loaded.stats[policy.norm_heads[0]].actions
    return stats.min, stats.max


def test_what_stays_inside_is_untouched_and_what_leaves_is_refused_by_name(policy, one, extremes):
    actions, (low, high) = policy.act(one), extremes
    excess = np.maximum((actions - high) / (high - low), (low - actions) / (high - low))
    most = excess.max()
    assert most > 0.05, "the case needs a policy of few steps that leaves the range"
    np.testing.assert_array_equal(policy.act(one, limits=Limits("refuse", most + 0.01)), actions)
    with pytest.raises(UnsafeActions) as caught:
        policy.act(one, limits=Limits("refuse", most - 0.01))
    step, dim = np.unravel_index(np.argmax(excess), excess.shape)
    assert f"action[{dim}] is {actions[step, dim]:g} at step {step}, trained on {low[dim]:g}" in caught.value.what
    assert not isinstance(caught.value, UserError)
    with pytest.raises(UnsafeActions):
        policy.act(one, limits=Limits(margin=0.0))


def test_clipped_actions_end_at_the_margin_and_are_warned_of(policy, one, extremes, caplog):
    actions, (low, high) = policy.act(one), extremes
    for margin in (0.0, 0.02):
        with caplog.at_level(logging.WARNING):
            clipped = policy.act(one, limits=Limits("clip", margin))
        span = margin * (high - low)
        np.testing.assert_allclose(clipped, np.clip(actions, low - span, high + span), atol=1e-3)
        assert "brought back to there" in caplog.text and (clipped != actions).any()
        caplog.clear()
    np.testing.assert_array_equal(policy.act(one, limits="clip"), policy.act(one, limits=Limits("clip", 0.1)))


def test_each_step_has_its_range_where_it_has_its_statistics(policy):
    trained = policy.robot().range
    per_step = [np.stack([v, 2 * v]) for v in (trained.low, trained.high)]
    stepwise = type(trained)(trained.names, *per_step, trained.affine)
    low, high, offset, scale = stepwise.of_steps(4)
    np.testing.assert_array_equal(low, [per_step[0][0], *[per_step[0][1]] * 3])
    chunk = ((high - offset) * scale).astype(np.float32)[None]
    np.testing.assert_array_equal(Limits("refuse", 1e-4).held(chunk, stepwise), chunk)
    with pytest.raises(UnsafeActions, match="at step 0"):
        Limits("refuse", 1e-4).held(chunk[:, ::-1], stepwise)


def test_actions_that_are_not_finite_are_refused_whatever_the_limits(policy, one, monkeypatch):
    whole = policy.loaded.policy.velocity
    for bad in (np.nan, np.inf):
        monkeypatch.setattr(policy.loaded.policy, "velocity", lambda *given, bad=bad: whole(*given) * bad)
        for limits in (None, "clip", "refuse"):
            with pytest.raises(UnsafeActions, match="of 24 predicted actions aren't finite"):
                policy.act(one, limits=limits)


def test_a_constant_dimension_has_no_range_to_leave(policy):
    trained = policy.robot().range
    flat = type(trained.affine)(trained.affine.offset, trained.affine.scale * 0)
    still = type(trained)(trained.names, trained.low, trained.high, flat)
    chunk = np.full((1, 3, 3), 1e6, np.float32)
    np.testing.assert_array_equal(Limits("refuse", 0.0).held(chunk, still), chunk)


def test_limits_that_are_none_are_refused():
    for wrong in ({"then": "ignore"}, {"margin": -0.1}, {"margin": np.nan}):
        with pytest.raises(UserError):
            Limits(**wrong)
