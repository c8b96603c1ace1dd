"""Rotations of a chunk at another rate than its dataset's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from opentau_train.data.chunk import rows_at
from opentau_train.data.convention import WIDTHS, Convention, Part
from opentau_train.data.conventions.between import rotations_between
from opentau_train.data.conventions.rotations import from_matrices
from tests.rotation_formulas import angle_between, matrices

PLACES = np.array([0.25, 1.5, 2.0, 3.75, 5.5, 9.0, 12.0])


def rows_of(form: str, unit: str) -> tuple[np.ndarray, Rotation]:
    """(rows [10, 1 + n + 1] with the rotation in the middle, the rotations): up to 70 degrees from row to row."""
    rng = np.random.default_rng(3)
    steps = Rotation.from_rotvec(rng.normal(size=(10, 3)) * 0.5)
    turned = [Rotation.from_euler("xyz", [3.0, 0.1, -3.0])]
    for step in steps[1:]:
        turned.append(step * turned[-1])
    turns = Rotation.concatenate(turned)
    numbers = from_matrices(turns.as_matrix(), f"{form}:deg" if unit == "deg" else form)
    return np.column_stack([np.arange(10), numbers, -np.arange(10)]).astype(np.float32), turns


@pytest.mark.parametrize("unit", ["rad", "deg"])
@pytest.mark.parametrize("form", WIDTHS)
def test_declared_rotations_turn_from_row_to_row_and_all_else_stays_linear(form, unit):
    unit = unit if form in ("euler_xyz", "euler_zyx", "axis_angle") else "none"
    rows, turns = rows_of(form, unit)
    parts = (Part("other", dims=1), Part("rotation", rotation=form, unit=unit), Part("other", dims=1, name="end"))
    between = rotations_between(Convention(actions=parts), tuple(map(str, range(rows.shape[1]))))
    found, is_pad = rows_at(rows, PLACES, between=between)
    plain, _ = rows_at(rows, PLACES)
    expected = Slerp(np.arange(10), turns)(np.minimum(PLACES, 9)).as_matrix()
    numbers = np.deg2rad(found[:, 1:-1]) if unit == "deg" else found[:, 1:-1]
    assert angle_between(matrices(numbers, form), expected).max() < 1e-5
    assert found[:, [0, -1]].tobytes() == plain[:, [0, -1]].tobytes()
    whole = PLACES % 1 == 0
    assert found[whole].tobytes() == plain[whole].tobytes()
    assert is_pad.tolist() == [False] * 6 + [True] and found.dtype == np.float32


@pytest.mark.parametrize("form", ["euler_xyz", "quat_xyzw", "axis_angle"])
def test_of_the_numbers_of_one_rotation_those_are_taken_that_the_rows_have(form):
    """Near half a turn, where angles and axes jump and quaternions may have either sign."""
    angles = np.array([3.0, 3.1, 3.2, 3.3])
    rows = {
        "euler_xyz": np.column_stack([angles, 0 * angles, 0 * angles]),
        "axis_angle": np.column_stack([angles, 0 * angles, 0 * angles]),
        "quat_xyzw": -np.column_stack([np.sin(angles / 2), 0 * angles, 0 * angles, np.cos(angles / 2)]),
    }[form].astype(np.float32)
    unit = "none" if form == "quat_xyzw" else "rad"
    part = Part("rotation", rotation=form, unit=unit)
    between = rotations_between(Convention(actions=(part,)), tuple(map(str, range(rows.shape[1]))))
    found, _ = rows_at(rows, np.array([0.5, 1.5, 2.5]), between=between)
    np.testing.assert_allclose(found, (rows[1:] + rows[:-1]) / 2, atol=2e-3)


@pytest.mark.parametrize(
    "parts", [None, (Part("other", dims=3),), (Part("rotation", dims=3),), (Part("rotation", rotation="euler_xyz"),)]
)
def test_where_no_rotation_is_known_nothing_is_between(parts):
    assert rotations_between(Convention(actions=parts), ("a", "b", "c")) is None


def test_a_wrapping_angle_does_not_go_through_zero():
    rows = np.array([[0, 0, 3.1], [0, 0, -3.1]], np.float32)
    part = Part("rotation", rotation="euler_xyz", unit="rad")
    between = rotations_between(Convention(actions=(part,)), ("a", "b", "c"))
    found, _ = rows_at(rows, np.array([0.25, 0.75]), between=between)
    assert np.abs(found[:, 2]) == pytest.approx([3.1208, 3.1208], abs=1e-3)
    assert found[0, 2] > 0 > found[1, 2]
    assert rows_at(rows, np.array([0.25]))[0][0, 2] == pytest.approx(1.55)
