"""What `make test-nightly` tries and `.ci/run` leaves to it: cases whose parts others have by day."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

AT_NIGHT = (pytest.mark.slow, pytest.mark.nightly)


def at_night(test: Callable) -> Callable:
    """Leave a test to the night."""
    for mark in AT_NIGHT:
        test = mark(test)
    return test


def by_day(cases: Iterable[Any], *day: Any) -> list[Any]:
    """`cases` of a parametrised test, of which all but `day` are left to the night; those of several parameters are
    tuples."""
    return [case if case in day else pytest.param(*_values(case), marks=AT_NIGHT) for case in cases]


def _values(case: Any) -> tuple:
    return case if isinstance(case, tuple) else (case,)
