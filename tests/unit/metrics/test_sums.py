import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.metrics.sums import Sums, exact, group_means, training_row, validation_row
from opentau_train.types import Group

GROUPS = [Group("a", "joint", "r::joint", 0.75), Group("b", "ee", "r::ee", 0.25), Group("c", "ee", "r::ee", 0.5)]
WEIGHTS = {"mse": 1.0, "ce": 0.1}


def test_sums_take_a_mixed_batch_apart_exactly():
    sums = Sums(3, ["mse", "ce"])
    values = {"mse": (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 2.0]))}
    sums.add(torch.tensor([0, 2, 0]), values)
    sums.add(torch.tensor([2, 2, 0]), values)
    assert sums.values[:, 0].tolist() == [[9.0, 5.0], [0.0, 0.0], [5.0, 3.0]]
    assert sums.values[:, 1].abs().sum() == 0


def test_group_without_supervision_is_absent_and_changes_no_aggregate():
    episodes = np.zeros((3, 2, 2))
    episodes[0] = [[4.0, 2.0], [6.0, 2.0]]
    episodes[1] = [[8.0, 2.0], [0.0, 0.0]]
    row = validation_row(episodes, np.array([0, 1, 2]), np.ones(3), GROUPS, ["mse", "ce"], WEIGHTS)
    assert row["Validation/a/joint/MSE"] == 2.0 and row["Validation/b/ee/MSE"] == 4.0
    assert "Validation/b/ee/CE" not in row and not any("/c/" in tag for tag in row)
    assert row["Validation/MSE"] == pytest.approx(0.75 * 2 + 0.25 * 4)
    assert row["Validation/CE"] == 3.0
    assert row["Validation/Loss"] == pytest.approx(2.5 + 0.1 * 3)


def test_only_groups_that_are_not_trained_on_have_the_term_and_their_windows_weigh_them():
    """Group a, which is trained on, has no element of it: its share must not make the others weigh nothing."""
    groups = [GROUPS[0], *(Group(name, "ee", "r::ee", 0.0) for name in "bc")]
    episodes = np.array([[[0.0, 0.0]], [[8.0, 2.0]], [[3.0, 3.0]]])
    row = validation_row(episodes, np.array([0, 1, 2]), np.array([9.0, 1.0, 3.0]), groups, ["mse"], WEIGHTS)
    assert row["Validation/MSE"] == pytest.approx((1 * 4.0 + 3 * 1.0) / 4)


def test_totals_do_not_depend_on_the_order_of_the_samples():
    """Float64 alone would keep some of the small losses where they come first, and none behind the large one."""
    losses = torch.tensor([1e6] + [1e-10] * 1000)
    totals = set()
    for values in (losses, losses.flip(0)):
        sums = Sums(1, ["mse"])
        for value in values:
            sums.add(torch.zeros(1, dtype=torch.int64), exact({"mse": (value[None], torch.ones(1))}))
        totals.add(sums.values[0, 0, 0].item())
    assert len(totals) == 1


def test_zero_loss_is_zero_not_absent():
    episodes = np.array([[[0.0, 5.0]]])
    row = validation_row(episodes, np.array([0]), np.ones(1), GROUPS, ["mse"], WEIGHTS)
    assert row["Validation/a/joint/MSE"] == 0.0
    assert "Validation/a/joint/MSE/StdErr" not in row


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), min_size=2, max_size=20))
def test_error_of_equal_clusters_is_the_standard_error_of_their_means(rows):
    means = np.array([m for m, _ in rows])
    expected = means.std(ddof=1) / np.sqrt(len(rows))
    assert error_of(means * 4.0, np.full(len(rows), 4.0)) == pytest.approx(expected, abs=1e-9)


def test_error_needs_two_episodes_with_elements():
    assert np.isnan(error_of(np.array([1.0, 0.0]), np.array([2.0, 0.0])))


def error_of(sums: np.ndarray, counts: np.ndarray) -> float:
    """The standard error of one group and term, from the sums and counts [E] of its episodes."""
    episodes = np.stack([sums, counts], axis=-1)[:, None]
    return float(group_means(episodes, np.zeros(len(sums), np.int64), np.ones(len(sums)), 1).error[0, 0])


def test_training_row_divides_sums_by_counts_never_averages_averages():
    sums = np.zeros((3, 2, 2))
    sums[0, 0], sums[1, 0] = [1.0, 1.0], [9.0, 9.0 * 9]
    row = training_row(sums, GROUPS, ["mse", "ce"], WEIGHTS)
    assert row["Training/MSE"] == pytest.approx(10 / 82)
    assert row["Training/Loss"] == row["Training/MSE"]
    assert row["Training/a/joint/MSE"] == 1.0 and "Training/CE" not in row


def test_nan_loss_is_shown_not_hidden():
    sums = np.zeros((3, 1, 2))
    sums[0, 0] = [np.nan, 3.0]
    assert np.isnan(training_row(sums, GROUPS, ["mse"], WEIGHTS)["Training/MSE"])
