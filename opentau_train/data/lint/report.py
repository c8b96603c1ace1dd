"""All sources of a mixture judged, as lines of text and as an error."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from opentau_train.data.lint.judge import Judged, Verdict, between, judge
from opentau_train.data.lint.reading import read_sample
from opentau_train.data.mixture.mixture import Dataset
from opentau_train.errors import UserError
from opentau_train.types import Group

QUIET = ("free", "none", "as its state", "continuous", "steady", "moving")
"""Findings that are worth no line."""


def lint(datasets: Sequence[Dataset], groups: Sequence[Group], num: int) -> dict[str, Judged]:
    """{source: what up to `num` of its episodes say}; {"A and B": what two sources that share a norm head say of one
    another}. Raises `UserError` for rows that can't be read, and a convention that doesn't fit its dimensions."""
    judged = {}
    for d in datasets:
        sample, where = read_sample(d.source, num), f"data.sources.{d.name}"
        judged[d.name] = judge(sample, d.settings.convention, where, by_time=d.settings.fps is not None)
    heads = {d.name: {groups[g].norm_head for g in d.group_of} for d in datasets}
    for one, other in combinations(list(judged), 2):
        if heads[one] & heads[other]:
            judged[f"{one} and {other}"] = Judged(tuple(between(judged[one], judged[other])))
    return judged


def report(name: str, judged: Judged) -> list[str]:
    """Lines on one source: what contradicts its declaration, what casts doubt on it, what agrees, what is noted, what
    can't be told."""
    lines = []
    for answer in ("contradiction", "doubt", "agree", "note"):
        for verdict in judged.verdicts:
            if verdict.answer == answer and verdict.finding.value not in QUIET:
                lines.append(f"  {answer}: {_told(verdict)} ({verdict.finding.evidence})")
                lines += [f"    remedy: {verdict.remedy}"] if verdict.remedy else []
    unknown = [f"{v.finding.name}{_of(v.finding.dims)}" for v in judged.verdicts if v.answer == "unknown"]
    lines += [f"  unknown: {'; '.join(dict.fromkeys(unknown))}"] if unknown else []
    lines += [f"  to declare: '{judged.declare}'"] if judged.declare else []
    return [f"rows of {name}:", *lines] if lines else []


def contradiction(judged: dict[str, Judged]) -> UserError | None:
    """The error for what contradicts the declarations, if anything does."""
    wrong = [v for of_source in judged.values() for v in of_source.verdicts if v.answer == "contradiction"]
    if not wrong:
        return None
    more = f" (and {len(wrong) - 1} more above)" if len(wrong) > 1 else ""
    return UserError(f"the data say otherwise: {_told(wrong[0])}{more}", where=wrong[0].where, remedy=wrong[0].remedy)


def _told(verdict: Verdict) -> str:
    against = f", declared {verdict.declared}" if verdict.answer in ("contradiction", "doubt") else ""
    likely = "likely " * (verdict.finding.confidence < 1)
    return f"{verdict.finding.name}{_of(verdict.finding.dims)} is {likely}{verdict.finding.value}{against}"


def _of(names: Sequence[str]) -> str:
    """The names, of many the first and the last."""
    shown = ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)})"
    return f" of {shown}" if names else ""
