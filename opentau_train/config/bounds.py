"""What a setting's number may be, for its type hint: `steps: Annotated[int, positive]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from opentau_train.errors import UserError


@dataclass(frozen=True)
class Bound:
    """Called with a setting's path and value it raises `UserError` where the value, if it isn't None (not set), is
    out of bounds; `str` says the bounds in words, for `--help`."""

    check: Callable[[str, Any], None]
    words: str

    def __call__(self, path: str, value: Any) -> None:
        self.check(path, value)

    def __str__(self) -> str:
        return self.words


def positive(path: str, value: float | None) -> None:
    """Raises `UserError` unless `value` is greater than 0, or None (not set)."""
    if value is not None and not value > 0:
        raise UserError(f"{path} must be greater than 0, got {value}", remedy=f"set {path} to a positive number")


def at_least(path: str, value: float | None, low: float) -> None:
    """Raises `UserError` unless `value` is `low` or more, or None (not set)."""
    if value is not None and value < low:
        raise UserError(f"{path} must be at least {low}, got {value}", remedy=f"set {path} to {low} or more")


def minimum(low: float) -> Bound:
    """The bound of numbers from `low` on."""
    return Bound(partial(at_least, low=low), f">= {low:g}")


def _fraction(path: str, value: float | None) -> None:
    if value is not None and not 0.0 <= value < 1.0:
        raise UserError(f"{path} must be in [0, 1), got {value}", remedy=f"set {path} to a fraction such as 0.1")


def within(low: float, high: float) -> Bound:
    """A bound that raises `UserError` unless a value is a number from `low` to `high`, or two rising ones, or None."""

    def check(path: str, value: float | tuple[float, float] | None) -> None:
        first, last = value if isinstance(value, tuple) else (value, value)
        if first is None or last is None or low <= first <= last <= high:
            return
        what = "two rising numbers" if isinstance(value, tuple) else "a number"
        remedy = f"set {path}={'[LOW,HIGH]' if isinstance(value, tuple) else 'NUMBER'} within these"
        raise UserError(f"{path} must be {what} from {low:g} to {high:g}, got {value}", remedy=remedy)

    return Bound(check, f"from {low:g} to {high:g}")


Count = Annotated[int, Bound(positive, ">= 1")]
Positive = Annotated[float, Bound(positive, "> 0")]
NotNegative = Annotated[float, minimum(0)]
Natural = Annotated[int, minimum(0)]
Fraction = Annotated[float, Bound(_fraction, "from 0 to below 1")]
LossWeight = Annotated[float, minimum(0)]
"""Of a term in the total loss; 0: it trains nothing."""
