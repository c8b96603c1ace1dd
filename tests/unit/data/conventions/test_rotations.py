"""Formats of rotations, against formulas of their own (`tests/rotation_formulas.py`)."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.data.conventions.rotations import Change, Rotations, from_matrices, to_matrices, width
from tests.rotation_formulas import about, angle_between, matrices, some

FORMS = (
    *("euler_xyz", "euler_zyx", "euler_xyz:deg", "axis_angle", "axis_angle:deg"),
    *("quat_xyzw", "quat_wxyz", "rot6d", "matrix"),
)
seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("form", FORMS)
@given(seed=seeds)
def test_a_form_means_the_matrix_of_the_formula_and_comes_back(form, seed):
    values = some(np.random.default_rng(seed), (5,), form)
    made = to_matrices(values, form)
    np.testing.assert_allclose(made, matrices(values, form), atol=2e-6)
    np.testing.assert_allclose(made @ made.mT, np.broadcast_to(np.eye(3), (5, 3, 3)), atol=1e-9)
    again = from_matrices(made, form)
    assert again.shape == (5, width(form))
    assert angle_between(matrices(again, form), made).max() < 1e-6


def test_roll_pitch_yaw_is_about_fixed_axes_x_first():
    roll, pitch, yaw = 0.3, -0.4, 1.2
    expected = about(2, yaw) @ about(1, pitch) @ about(0, roll)
    np.testing.assert_allclose(to_matrices(np.array([roll, pitch, yaw]), "euler_xyz"), expected, atol=1e-12)
    np.testing.assert_allclose(
        to_matrices(np.array([yaw, pitch, roll]), "euler_zyx"), about(0, roll) @ about(1, pitch) @ about(2, yaw)
    )
    np.testing.assert_allclose(from_matrices(expected, "rot6d"), [*expected[:, 0], *expected[:, 1]])
    np.testing.assert_allclose(to_matrices(np.array([0.0, 0, np.sin(0.5), np.cos(0.5)]), "quat_xyzw"), about(2, 1.0))


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
def test_each_form_becomes_each_other_and_back(before, after):
    rng = np.random.default_rng(3)
    other = rng.normal(size=(6, 2)).astype(np.float32)
    values = np.concatenate([other[:, :1], some(rng, (6,), before), other[:, 1:]], axis=1)
    change = Rotations(actions=(Change(1, before, after, "hand"),))
    made = change({"actions": values}, None)["actions"]
    assert made.dtype == np.float32 and made.shape == (6, 2 + width(after))
    np.testing.assert_array_equal(made[:, [0, -1]], other)
    assert angle_between(matrices(made[:, 1:-1], after), matrices(values[:, 1:-1], before)).max() < 5e-6
    back = change.inverse({"actions": made})["actions"]
    assert angle_between(matrices(back[:, 1:-1], before), matrices(values[:, 1:-1], before)).max() < 5e-6
    names = change.names((), ("a", *"b" * width(before), "c"))[1]
    assert names == ("a", *(f"hand.{after.partition(':')[0]}[{i}]" for i in range(width(after))), "c")


@pytest.mark.parametrize("form", ["quat_xyzw", "quat_wxyz"])
def test_quaternions_go_on_along_a_chunk_and_begin_with_a_positive_w(form):
    turns = about(0, np.linspace(0.5, 6.5, 40)).reshape(2, 20, 3, 3)  # past half a turn, where w becomes negative
    found = from_matrices(turns, form, chunk=True)
    w = found[..., 0 if form == "quat_wxyz" else 3]
    assert (w[:, 0] >= 0).all() and w.min() < 0
    assert np.abs(np.diff(found, axis=1)).max() < 0.2
    assert (from_matrices(turns, form)[..., 0 if form == "quat_wxyz" else 3] >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_what_a_policy_predicts_is_made_a_rotation_without_a_word(form):
    rng = np.random.default_rng(0)
    predicted = np.concatenate([rng.normal(size=(4, width(form))), np.zeros((1, width(form)))]).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = to_matrices(predicted, form)
        assert np.isfinite(from_matrices(made, "euler_xyz")).all()
    np.testing.assert_allclose(np.linalg.det(made[:4]), 1.0, atol=1e-6)


def test_gimbal_lock_is_still_the_same_rotation():
    locked = to_matrices(np.array([0.7, np.pi / 2, -0.2]), "euler_xyz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = from_matrices(locked, "euler_xyz")
    assert angle_between(to_matrices(again, "euler_xyz"), locked) < 1e-6
