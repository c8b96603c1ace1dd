"""Patterns that name dimensions of state and actions in a configuration."""

from __future__ import annotations

import re


def fits(name: str, pattern: str) -> bool:
    """Whether a dimension's name fits a pattern. `*` alone is special: dimensions have brackets in their names."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def unbracketed(name: str) -> str:
    """`column.3` for the dimension `column[3]`, whose brackets a command line would have to quote."""
    return re.sub(r"\[(\d+)\]$", r".\1", name)
