"""The measured variance inflation: right on gradients whose correlation is known, and on a real policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import vif
from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.models.draws import Draws
from opentau_train.models.flow import FlowPolicy
from tests.program import TOY, train_here
from tests.unit.models.flow_cases import make_batch, make_policy


def gradients(num: int, length: int, episode: float, neighbours: float, frames: float) -> np.ndarray:
    """[num, length, 64] normal vectors with correlation `episode + neighbours exp(-d / frames)`."""
    rng = np.random.default_rng(0)
    decay = np.exp(-1 / frames)
    walk = [rng.normal(size=(num, 64))]
    for _ in range(length - 1):
        walk.append(decay * walk[-1] + np.sqrt(1 - decay**2) * rng.normal(size=(num, 64)))
    own = rng.normal(size=(num, length, 64))
    shared = rng.normal(size=(num, 1, 64))
    parts = (shared, episode), (np.stack(walk, 1), neighbours), (own, 1 - episode - neighbours)
    return sum(np.sqrt(share) * part for part, share in parts)


def test_the_correlation_is_found_again():
    correlation, pairs = vif.correlation_by_distance(gradients(300, 40, 0.2, 0.5, 6.0))
    distance = np.arange(40)
    expected = np.where(distance, 0.2 + 0.5 * np.exp(-distance / 6.0), 1.0)
    np.testing.assert_allclose(correlation, expected, atol=0.03)
    assert pairs.tolist() == [300 * (40 - d) for d in distance]
    found = vif.fit(correlation, pairs)
    assert (found.episode, found.neighbours) == pytest.approx((0.2, 0.5), abs=0.04)
    assert found.frames == pytest.approx(6.0, rel=0.25)


def test_few_episodes_do_not_bias_the_correlation():
    found = [vif.correlation_by_distance(gradients(4, 20, 0.3, 0.0, 1.0) + shift)[0][10] for shift in (0.0, 5.0)]
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_inflation_of_equally_correlated_samples_is_the_design_effect(rho):
    found = vif.inflation(gradients(400, 8, rho, 0.0, 1.0))
    assert found == pytest.approx(1 + 7 * rho, rel=0.1)


def test_a_sketch_keeps_the_inner_products_of_the_samples_gradients():
    policy: FlowPolicy = make_policy()
    batch = make_batch(policy.spec, 5)
    sketch = vif.Sketcher(policy, {"mse": 10.0, "ce": 10.0})
    found = sketch(batch)
    exact = []
    for single in batch.split(1):
        terms = policy(single, Draws(single.key))
        loss = sum(policy.loss_weights[k] * terms[k][0].sum() / 10.0 for k in terms)
        exact.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))]).numpy())
    exact = np.stack(exact).astype(np.float64)
    lengths = np.sqrt(np.square(exact).sum(1))
    np.testing.assert_allclose(found @ found.T, exact @ exact.T, atol=0.1 * lengths.max() ** 2)
    np.testing.assert_array_equal(sketch(batch), found)


@pytest.mark.slow
def test_on_a_run_it_prints_settings_that_the_program_takes(tmp_path, capsys):
    run = train_here([*TOY, "trainer.steps=2", "validation.every=0"], tmp_path / "run")
    assert vif.main([str(run), "--batches", "3", "--episodes", "3", "--frames", "6"]) == EXIT_OK
    *_, summary, setting = capsys.readouterr().out.splitlines()
    assert summary.startswith("VIF of the tape's batches: measured ")
    train_here([*TOY, setting, "trainer.steps=1", "validation.every=0"], tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "said"),
    [("--batches=1", "--batches must be at least 2"), ("--frames=1000", "ask for fewer: the longest run has ")],
)
def test_what_can_not_be_measured_is_a_user_error(tmp_path, capsys, wrong, said):
    run = train_here([*TOY, "trainer.steps=1", "validation.every=0"], tmp_path / "run")
    assert vif.main([str(run), wrong]) == EXIT_USER
    assert said in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_a_user_error(tmp_path, capsys):
    assert vif.main([str(tmp_path)]) == EXIT_USER
    assert "error:" in capsys.readouterr().err
