"""The predicted variance inflation: equal to its definition over all pairs, and to the cases known from the books."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opentau_train.config.data import CorrelationSettings
from opentau_train.data.order import quality
from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.order.tape import Tape
from opentau_train.data.order.windows import Windows

RHO = CorrelationSettings(episode=0.1, neighbours=0.4, frames=8.0)


def windows(dataset, episode, frame) -> Windows:
    columns = [np.asarray(c, np.int64) for c in (dataset, episode, frame)]
    zeros = np.zeros(len(columns[0]), np.int64)
    return Windows(np.arange(len(zeros)), zeros, columns[0], zeros, columns[1], columns[2], zeros)


def tape(num_episodes=400, length=60, shuffle=True, **options) -> Tape:
    place = np.arange(num_episodes)
    blocks = DatasetBlocks(
        "d",
        place.astype(np.int32),
        np.zeros(num_episodes, np.int32),
        np.full(num_episodes, length, np.int32),
        place,
        shuffle,
    )
    return Tape([blocks], [num_episodes * length], seed=3, **{"batch_size": 32, "phase_rows": 64, **options})


def over_all_pairs(found: Windows, weight: np.ndarray) -> float:
    """The definition, pair by pair."""
    total = 0.0
    for i in range(len(found)):
        for j in range(len(found)):
            if i == j:
                total += weight[i] ** 2
            elif (found.dataset[i], found.episode[i]) == (found.dataset[j], found.episode[j]):
                distance = abs(int(found.frame[i] - found.frame[j]))
                rho = RHO.episode + RHO.neighbours * np.exp(-distance / RHO.frames)
                total += weight[i] * weight[j] * rho
    return total / np.square(weight).sum()


samples = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 300), st.floats(0.01, 1.0)), min_size=1, max_size=40
)


@given(samples)
@settings(max_examples=60, deadline=None)
def test_inflation_is_the_sum_over_all_pairs(rows):
    dataset, episode, frame, weight = (np.array(c) for c in zip(*rows))
    found = windows(dataset, episode, frame)
    assert quality.inflation(found, RHO, weight) == pytest.approx(over_all_pairs(found, weight), rel=1e-9)


def test_equal_clusters_give_kish_design_effect():
    rho = CorrelationSettings(episode=0.3, neighbours=0.0)
    clusters = windows(np.zeros(24), np.repeat(np.arange(4), 6), np.tile(np.arange(6) * 50, 4))
    assert quality.inflation(clusters, rho) == pytest.approx(1 + (6 - 1) * 0.3)


def test_samples_of_distinct_episodes_are_independent():
    assert quality.inflation(windows(np.arange(20) % 2, np.arange(20), np.zeros(20)), RHO) == 1.0


def test_a_batch_of_one_window_repeated_is_as_noisy_as_its_correlation():
    same = windows(np.zeros(10), np.zeros(10), np.full(10, 7))
    assert quality.inflation(same, RHO) == pytest.approx(1 + 9 * 0.5)


@pytest.mark.parametrize("num_episodes", [3, 40])
def test_random_draws_have_no_inflation_however_few_the_episodes(num_episodes):
    plan = tape(num_episodes=num_episodes)
    rho_0, rng = quality.background(plan, RHO), np.random.default_rng(0)
    draws = [rng.integers(0, num_episodes * 60, 256) for _ in range(400)]
    found = [quality.inflation(windows(d * 0, d // 60, d % 60), RHO, background=rho_0) for d in draws]
    assert np.mean(found) == pytest.approx(1.0, abs=4 * np.std(found) / 20)


def test_background_is_the_mean_over_all_pairs():
    plan = tape(num_episodes=3, length=9)
    every = windows(np.zeros(27), np.repeat(np.arange(3), 9), np.tile(np.arange(9), 3))
    own = 27 * (RHO.episode + RHO.neighbours)  # two draws of one window are not one sample
    pairs = (over_all_pairs(every, np.ones(27)) - 1) * 27 + own
    assert quality.background(plan, RHO) == pytest.approx(pairs / 27**2)


def test_without_momentum_the_horizon_is_the_batch():
    plan = tape()
    shuffle = quality.ShuffleQuality(plan, RHO)
    assert shuffle.of_momentum(20, beta=0.0) == shuffle.of_batch(plan.batch(20))


def test_the_horizon_weighs_past_steps_by_the_momentum():
    plan = tape(num_episodes=4000, batch_size=4, lanes_per_sample=1)
    found = plan.windows(np.arange(4 * 31))
    weight = 0.8 ** (30 - found.t // 4)
    of_momentum = quality.ShuffleQuality(plan, RHO).of_momentum(30, beta=0.8)
    assert of_momentum == pytest.approx(over_all_pairs(found, weight), rel=0.02)


def test_more_lanes_decorrelate_more_and_reading_in_order_least():
    plans = [quality.ShuffleQuality(tape(lanes_per_sample=v), RHO) for v in (1, 2, 4, 8)]
    at = [plan.of_momentum(200) for plan in plans]
    assert at == sorted(at, reverse=True)
    assert at[-1] < 2.5
    in_order = quality.ShuffleQuality(tape(shuffle=False), RHO)
    assert in_order.of_batch(in_order.tape.batch(50)) > 5 * plans[2].of_batch(plans[2].tape.batch(50))
    assert in_order.of_momentum(200) > 3 * at[2]


def test_the_row_is_of_the_step_s_batch():
    plan = tape(shuffle=False, length=8)
    shuffle = quality.ShuffleQuality(plan, RHO)
    row = shuffle.row(plan.batch(3), 3)
    assert row["Training/DistinctEpisodes"] == 4.0
    assert row["Training/PredictedVIF"] == shuffle.of_batch(plan.batch(3)) > 1.0
    assert row["Training/PredictedVIFMomentum"] == shuffle.of_momentum(3)


def test_no_samples_have_no_inflation():
    with pytest.raises(ValueError, match="no samples"):
        quality.inflation(windows([], [], []), RHO)
