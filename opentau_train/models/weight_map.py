"""How the tensors of a published file of weights become a policy's own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class WeightMap:
    """From a file's names of tensors to the names in the policy's `state_dict`, by default the same ones.

    `renames`: (regular expression, replacement), applied in order to a name of the file. The rest are patterns, as a
    shell has them. Of the file's names: `ignored`, which the policy has no use for, and `fallback`, which is read only
    where no other gives the same tensor, as a head that shares the table of tokens. Of the policy's own: `part`, what
    the file is to fill; `new`, what it may lack: it keeps its initialisation; `resized`, whose first or last axis goes
    over a state's or action's dimensions: filled up with zeros, or cut, where the user wants that
    (`model.resize_dims`). `note`: what the user must know of such weights with these settings; `shapes`: what else to
    look at where shapes differ.
    """

    renames: tuple[tuple[str, str], ...] = ()
    new: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    part: tuple[str, ...] = ("*",)
    note: str = ""
    shapes: str = ""

    def own_name(self, published: str) -> str:
        """The policy's name of what a file calls `published`."""
        for pattern, replacement in self.renames:
            published = re.sub(pattern, replacement, published)
        return published


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` fits one of `patterns`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
