"""What a change of a setting means for a run that is resumed. It stands beside the setting, in its field's metadata:

    log_every: int = field(default=10, metadata=SAFE)
    seed: int = field(default=0, metadata=NEW_PLAN)

A setting that says nothing means what its section does, and a section what the one around it does. `drift` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

Kind = Literal["safe", "warned", "refused"]

ON_RESUME = "on_resume"
"""The key in a field's metadata."""


@dataclass(frozen=True)
class Meaning:
    """`why`: what the change does, in the user's words. `new_plan`: it changes the order of the samples, which
    `resume.data=restart` allows. `keys`: {pattern: meaning} of keys in a section that a class of its own reads; the
    first that fits counts. `judge`: (old value, new value, {dotted key: value} of the new configuration) -> the meaning
    of this very change, where it depends on them."""

    kind: Kind
    why: str = ""
    new_plan: bool = False
    keys: Mapping[str, Meaning] = field(default_factory=dict)
    judge: Callable[[Any, Any, Mapping[str, Any]], Meaning] | None = None

    def of_key(self, key: str) -> Meaning:
        """The meaning of a `key` inside the section whose meaning this is."""
        inherited = replace(self, keys={})
        return next((meaning for pattern, meaning in self.keys.items() if fnmatchcase(key, pattern)), inherited)

    def of_change(self, old: Any, new: Any, now: Mapping[str, Any]) -> Meaning:
        """The meaning of the change from `old` to `new` in the new configuration `now`, {dotted key: value}."""
        return self if self.judge is None else self.judge(old, new, now)


FROM_HERE_ON = Meaning("warned", "from here on")

SAFE = {ON_RESUME: Meaning("safe")}
"""Metadata of a setting whose change alters no number of the training."""

NEW_PLAN = {ON_RESUME: Meaning("refused", "the data plan changes", new_plan=True)}


def warned(why: str = FROM_HERE_ON.why) -> dict[str, Meaning]:
    """Metadata of a setting whose change alters the training from here on, as was perhaps meant."""
    return {ON_RESUME: Meaning("warned", why)}


def refused(why: str, keys: Mapping[str, Meaning] | None = None) -> dict[str, Meaning]:
    """Metadata of a setting that mustn't change: what was trained so far wouldn't fit any more."""
    return {ON_RESUME: Meaning("refused", why, keys=keys or {})}


def judged(judge: Callable[[Any, Any, Mapping[str, Any]], Meaning]) -> dict[str, Meaning]:
    """Metadata of a setting for which `judge` decides, from the old and the new value."""
    return {ON_RESUME: Meaning("warned", FROM_HERE_ON.why, judge=judge)}


def longer(old: Any, new: Any, now: Mapping[str, Any]) -> Meaning:
    """What a change of `trainer.steps` means: a constant learning rate doesn't depend on it."""
    if str(now.get("scheduler._target_")).endswith(".Constant") and isinstance(old, int) and new > old:
        return Meaning("safe")
    return Meaning("warned", "the schedule is stretched to the new length")


def other_average(old: Any, new: Any, now: Mapping[str, Any]) -> Meaning:
    """What a change of `trainer.ema_decay` means."""
    if old is None:
        return Meaning("refused", "the average isn't in the checkpoint: it begins here")
    return FROM_HERE_ON if new is not None else Meaning("refused", "the average is lost")
