"""The ranges that settings are held to. Each check takes a setting's path in the config and its value, and raises
`UserError` with both and the remedy where the value lies outside.
"""

from __future__ import annotations

from opentau_train.errors import UserError


def positive(path: str, value: float | None) -> None:
    """Greater than 0, or None (not set)."""
    if value is not None and not value > 0:
        raise UserError(f"{path} must be greater than 0, got {value}", remedy=f"set {path} to a positive number")


def at_least(path: str, value: float | None, low: float) -> None:
    """`low` or more, or None (not set)."""
    if value is not None and value < low:
        raise UserError(f"{path} must be at least {low}, got {value}", remedy=f"set {path} to {low} or more")


def fraction(path: str, value: float) -> None:
    """In [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise UserError(f"{path} must be in [0, 1), got {value}", remedy=f"set {path} to a fraction such as 0.1")
