"""One kind of generated source, and what the linter is asked about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from opentau_train.data.convention import Convention, Part
from opentau_train.data.lint.judge import Judged, between, judge
from opentau_train.data.lint.sample import EpisodeSample
from opentau_train.data.lint.vector import Verdict
from support.arms import Arm, declared, generate

WHERE = "data.sources.main"
_FAMILIES = (("polarity", "gripper direction"), ("rotation", "quaternion order"), ("unit",), ("frame",))
"""Findings that one and the same mistake contradicts."""


@dataclass(frozen=True)
class Case:
    """One kind of source: `arm` {key: value} as the data are, `wrong` {key of the convention: value} as they are
    falsely declared, `change` of the sample, and the key or finding that is `asked` about (None: of none, it is clean).
    `told`: the value to be found where nothing is declared of it. `beside`: the arm of a second source of the robot,
    and the question is between the two; `is_silent`: neither declares anything. `best`: the answer that its data allow
    (None: `found`, or a contradiction)."""

    name: str
    arm: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, Any] = field(default_factory=dict)
    change: Callable[[EpisodeSample, np.random.Generator], EpisodeSample] = lambda sample, rng: sample
    asked: str | None = None
    told: str | None = None
    beside: dict[str, Any] | None = None
    is_silent: bool = False
    best: Literal["doubt", "agree", "unknown"] | None = None

    @property
    def allowed(self) -> str:
        """The answer that the data allow."""
        return self.best or ("found" if self.told else "contradiction")

    def judged(self, seed: int) -> Judged:
        """What is judged of a source of this kind."""
        arm = Arm(seed, **self.arm)
        sample = self.change(generated(arm), np.random.default_rng([seed, 7]))
        one = judge(sample, Convention() if self.is_silent else declare(declared(arm), self.wrong), WHERE)
        if self.beside is None:
            return one
        second = Arm(seed + 10_000, **self.beside)
        convention = Convention() if self.is_silent else declare(declared(second), self.wrong)
        return Judged(tuple(between(one, judge(generated(second), convention, "data.sources.other"))))

    def is_about(self, verdict: Verdict) -> bool:
        """Whether a verdict is on what is asked."""
        key = verdict.where.removeprefix(f"{WHERE}.").removeprefix("convention.")
        return self.asked == verdict.finding.name or (self.asked == key and key.endswith(verdict.finding.name))

    def is_planted(self, verdict: Verdict) -> bool:
        """Whether a contradiction is of what was planted, or follows from it."""
        follows = [family for family in _FAMILIES if any(word in (self.asked or "") for word in family)]
        return self.is_about(verdict) or any(verdict.finding.name in family for family in follows)

    def read(self, judged: Judged) -> str:
        """The answer on what is asked: the first that says something."""
        known = [v for v in judged.verdicts if v.answer != "unknown" and self.is_about(v)]
        worst = sorted(known, key=lambda v: v.answer not in ("contradiction", "doubt"))
        if self.told is not None:
            told = [v.finding.is_usual for v in known if v.finding.value == self.told]
            return ("doubt" if all(told) else "found") if told else "unknown"
        return worst[0].answer if worst else "unknown"


@lru_cache(maxsize=64)
def generated(arm: Arm) -> EpisodeSample:
    return generate(arm)


def declare(convention: Convention, changes: dict[str, Any]) -> Convention:
    """The convention with keys such as `actions[0].unit` set."""
    for key, value in changes.items():
        vector, _, rest = key.partition("[")
        place, _, facet = rest.partition("].")
        parts: list[Part] = list(getattr(convention, vector))
        parts[int(place)] = replace(parts[int(place)], **{facet: value})
        convention = replace(convention, **{vector: tuple(parts)})
    return convention
