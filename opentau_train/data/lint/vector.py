"""The state or the actions of a source, part by part, and the verdicts on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from opentau_train.data.conventions.places import Located, locate
from opentau_train.data.lint.finding import Finding
from opentau_train.data.lint.parts import guess
from opentau_train.data.lint.sample import F64


@dataclass(frozen=True)
class Verdict:
    """A finding and what it means: it agrees with what is `declared`, contradicts it, casts doubt on it where it is
    only usual, is unknown, or is a note where nothing is declared. `where` is the key of the configuration that it is
    about, `remedy` what to write there."""

    finding: Finding
    answer: Literal["agree", "contradiction", "doubt", "unknown", "note"]
    where: str
    declared: Any = None
    remedy: str = ""


def hold(finding: Finding, declared: Any, where: str, agrees: bool | None = None, remedy: str | None = None) -> Verdict:
    """The verdict on a finding; `agrees` where that isn't whether it is what is declared."""
    if not finding.is_known:
        return Verdict(finding, "unknown", where, declared)
    if declared is None:
        return Verdict(finding, "note", where)
    if finding.value == declared if agrees is None else agrees:
        return Verdict(finding, "agree", where, declared)
    remedy = remedy or f"set {where}: {finding.value}"
    if finding.is_usual:
        return Verdict(finding, "doubt", where, declared, f"look at an episode; if it is so, {remedy}")
    return Verdict(finding, "contradiction", where, declared, remedy)


@dataclass(frozen=True)
class Vector:
    """The state or the actions: the key and the parts of its convention, its dimensions and its episodes."""

    name: Literal["state", "actions"]
    where: str
    is_declared: bool
    names: tuple[str, ...]
    parts: tuple[Located, ...]
    episodes: Sequence[F64]

    def rows(self, part: Located) -> list[F64]:
        return [values[:, list(part.places)] for values in self.episodes]

    def dims(self, part: Located) -> tuple[str, ...]:
        return tuple(self.names[place] for place in part.places)

    def key(self, part: Located, facet: str) -> str:
        return f"{self.where}[{self.parts.index(part)}].{facet}"

    def hold(self, part: Located, finding: Finding, agrees: bool | None = None, remedy: str | None = None) -> Verdict:
        """The verdict on the part's own key that the finding is called by."""
        if len(finding.dims) < len(part.places):
            remedy = f"give {', '.join(finding.dims)} a part of their own, with {finding.name}: {finding.value}"
        declared = getattr(part.part, finding.name)
        return hold(finding, declared, self.key(part, finding.name), agrees, remedy)


def vector_of(
    name: Literal["state", "actions"], declared: Any, names: tuple[str, ...], rows: Sequence[F64], where: str
) -> Vector:
    key = f"{where}.convention.{name}"
    parts = locate(declared, names, key) if declared else guess(names, np.concatenate(rows))
    return Vector(name, key, bool(declared), names, parts, rows)
