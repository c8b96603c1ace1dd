"""Finders of units: degrees or radians, millimetres or metres, and the range of a gripper."""

from __future__ import annotations

import numpy as np

from opentau_train.data.lint.finding import UNKNOWN, Finding, by_value
from opentau_train.data.lint.sample import F64

_SMALL_UNIT = {"angle": ("rad", 6.6, "deg", 13.0), "length": ("m", 3.0, "mm", 20.0)}
"""{quantity: (large unit, no value of an arm is beyond this, small unit, no value in the large one is beyond this)}: an
angle may be a turn and a bit, a wrist's two turns; an arm reaches less than 3 m."""
_LEAST_RANGE, _LEAST_MOVING = {"rad": 0.3, "m": 0.05}, {"rad": 3, "m": 2}
"""A dimension of the large unit that goes less than this may well be one of the small unit that rests; so many of them
and more can't."""
_PER_CENT = (95.0, 100.5)


def units(quantity: str, dims: tuple[str, ...], rows: F64) -> list[Finding]:
    """The unit of absolute angles or lengths `rows` [N, D] of one part, by dimension. One that is too large for radians
    is in degrees; radians are believed where most dimensions, three at least, move a lot within a turn. Numbers that
    end at 100 may be per cent of the joints' ranges."""
    large, inside, small, outside = _SMALL_UNIT[quantity]
    low, high = np.percentile(rows, [1, 99], axis=0)
    top = np.percentile(np.abs(rows), 99.5, axis=0)
    moving = int(((top <= inside) & (high - low > _LEAST_RANGE[large])).sum())
    is_large = (top <= inside) & (moving >= max(_LEAST_MOVING[large], 0.6 * len(dims)))
    outside = np.inf if _PER_CENT[0] < np.abs(rows).max() < _PER_CENT[1] and quantity == "angle" else outside
    values = [small if t > outside else large if fits else UNKNOWN for t, fits in zip(top, is_large, strict=True)]
    evidence = [f"values up to {t:.3g}, a range of {span:.3g}" for t, span in zip(top, high - low, strict=True)]
    return by_value("unit", dims, values, evidence)


def of_deltas(dims: tuple[str, ...], slopes: F64, of_states: set[str]) -> Finding:
    """The unit of the differences `dims`, whose state has the units `of_states`, one, and goes `slopes` [P] for each of
    them: the same unit, or the other one, where all agree to 10 %; they may as well be scaled."""
    of_state = of_states.pop() if len(of_states) == 1 else UNKNOWN
    factors = {"rad": {"rad": 1, "deg": np.pi / 180}, "deg": {"deg": 1, "rad": 180 / np.pi}}
    factors |= {"m": {"m": 1, "mm": 1e-3}, "mm": {"mm": 1, "m": 1e3}}
    fits = [u for u, factor in factors.get(of_state, {}).items() if np.all(np.abs(slopes / factor - 1) < 0.1)]
    evidence = f"the state, in {of_state}, goes {np.min(slopes):.3g} to {np.max(slopes):.3g} for each"
    return Finding("unit", dims, fits[0] if fits else UNKNOWN, evidence)


RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 100.0), (-100.0, 100.0), (0.0, 0.04), (0.0, 0.08), (0.0, 0.085), (0.0, 255.0))


def gripper_range(rows: F64, short: float = 0.15) -> tuple[float, float] | None:
    """The usual range that a gripper's values [N] fill: none goes beyond it by 5 %, and the outermost ones come within
    a share `short` of both its ends. None where there is no such range."""
    low, high = np.percentile(rows, [0.5, 99.5])
    for start, end in RANGES:
        beyond, inside = 0.05 * (end - start), short * (end - start)
        if start - beyond <= low <= start + inside and end - inside <= high <= end + beyond:
            return start, end
    return None


def fills(dims: tuple[str, ...], rows: F64, declared: tuple[float, float] | None) -> tuple[Finding, bool]:
    """(the usual range that a gripper's values [N] fill, whether that fits the one that is declared). A range is wrong
    where values lie beyond it by 10 % of its span, or fill a usual one that is 7 times smaller, up to the third of it
    that stays free where every grasp meets an object."""
    shown, (low, high), agrees = gripper_range(rows), np.percentile(rows, [0.5, 99.5]).tolist(), True
    if declared is not None:
        span = declared[1] - declared[0]
        smaller = shown or gripper_range(rows, 0.33)
        beyond = max(declared[0] - low, high - declared[1]) > 0.1 * span
        agrees = not beyond and not (smaller and smaller[1] - smaller[0] < 0.15 * span)
        near = max(low - declared[0], declared[1] - high) < 0.15 * span
        shown = (shown or (low, high)) if beyond else smaller if not agrees else shown if near else None
    value = f"[{shown[0]:.3g},{shown[1]:.3g}]" if shown else UNKNOWN
    return Finding("range", dims, value, f"values from {low:.3g} to {high:.3g}"), agrees
