"""What a setting's number may be, for its type hint: `steps: Annotated[int, positive]`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from opentau_train.errors import UserError


def positive(path: str, value: float | None) -> None:
    """Raises `UserError` unless `value` is greater than 0, or None (not set)."""
    if value is not None and not value > 0:
        raise UserError(f"{path} must be greater than 0, got {value}", remedy=f"set {path} to a positive number")


Count = Annotated[int, positive]
Positive = Annotated[float, positive]


def at_least(path: str, value: float | None, low: float) -> None:
    """Raises `UserError` unless `value` is `low` or more, or None (not set)."""
    if value is not None and value < low:
        raise UserError(f"{path} must be at least {low}, got {value}", remedy=f"set {path} to {low} or more")


LossWeight = Annotated[float, partial(at_least, low=0)]
"""Of a term in the total loss; 0: it trains nothing."""


def fraction(path: str, value: float) -> None:
    """Raises `UserError` unless `value` is in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise UserError(f"{path} must be in [0, 1), got {value}", remedy=f"set {path} to a fraction such as 0.1")


def within(low: float, high: float) -> Callable[[str, Any], None]:
    """A bound that raises `UserError` unless a value is a number from `low` to `high`, or two rising ones, or None."""

    def check(path: str, value: float | tuple[float, float] | None) -> None:
        first, last = value if isinstance(value, tuple) else (value, value)
        if first is None or last is None or low <= first <= last <= high:
            return
        what = "two rising numbers" if isinstance(value, tuple) else "a number"
        remedy = f"set {path}={'[LOW,HIGH]' if isinstance(value, tuple) else 'NUMBER'} within these"
        raise UserError(f"{path} must be {what} from {low:g} to {high:g}, got {value}", remedy=remedy)

    return check
