"""What a resumed run may change: the settings that differ from the checkpoint's, each safe, warned or refused.

- safe: changes no number of the training (paths, loggers, workers, layout of ranks, when to save or validate);
- warned: changes the training from here on, as was perhaps meant (learning rate, schedule, weight decay, dropout);
- refused: what was trained so far wouldn't fit any more. A changed data plan (seed, global batch, mixture) is forced
  by `resume.data=restart`; others (shapes, normalisation) by `resume.force`, which lists keys or the start of them, up
  to a dot.

What each means stands beside the setting (`resuming`).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opentau_train.config.resuming import FROM_HERE_ON, NEW_PLAN, ON_RESUME, Kind, Meaning
from opentau_train.config.settings import Settings
from opentau_train.config.typed import TARGET, defaults
from opentau_train.errors import UserError

PRESENT, ABSENT = "present", "absent"
"""What stands for a source as a whole."""


@dataclass(frozen=True)
class Change:
    """One setting that differs; None stands for a key that isn't there."""

    key: str
    old: Any
    new: Any
    meaning: Meaning

    def __str__(self) -> str:
        why = self.meaning.why
        return f"{self.key}: {self.old} -> {self.new}" + (f" ({why})" if why else "")

    @property
    def kind(self) -> Kind:
        return self.meaning.kind

    def forced_by(self, force: Collection[str], restart: bool) -> bool:
        """Whether `resume.force` or `resume.data=restart` allow it."""
        return restart if self.meaning.new_plan else any(_inside(self.key, start) for start in force)


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The differences between the checkpoint's configuration tree and the run's, in the order of `now`.

    A key that only one tree has counts with its default: a newer program may have settings that an older one hadn't.
    """
    old, new = (dict(_leaves(Settings, tree, "", FROM_HERE_ON)) for tree in (saved, now))
    values = {key: leaf.value for key, leaf in new.items()}
    changes = []
    sources = [set(_mapping(_mapping(tree.get("data")).get("sources"))) for tree in (saved, now)]
    for name in sorted(sources[0] ^ sources[1]):
        before, after = (PRESENT if name in names else ABSENT for names in sources)
        changes.append(Change(f"data.sources.{name}", before, after, NEW_PLAN[ON_RESUME]))
    alone = tuple(f"{c.key}." for c in changes)
    for key, leaf in {**new, **old}.items():
        before, after = old.get(key, _NOTHING).value, new.get(key, _NOTHING).value
        if before != after and not key.startswith(alone):
            changes.append(Change(key, before, after, leaf.meaning.of_change(before, after, values)))
    return changes


def check(changes: Sequence[Change], force: Collection[str] = (), *, restart: bool = False) -> None:
    """Raises `UserError` with the refused changes that neither `force` names nor `restart` allows, and with the
    overrides that would."""
    refused = [c for c in changes if c.kind == "refused" and not c.forced_by(force, restart)]
    if refused:
        keys = [c.key for c in refused if not c.meaning.new_plan]
        plan = ["resume.data=restart"] if any(c.meaning.new_plan for c in refused) else []
        overrides = [*plan, *(["resume.force=[" + ",".join(dict.fromkeys([*force, *keys])) + "]"] if keys else [])]
        plain = (c for c in refused if isinstance(c.old, str | int | float) and c.old not in (PRESENT, ABSENT))
        before = " ".join(f"{c.key}={c.old}" for c in plain)
        raise UserError(
            "settings differ from the checkpoint's: " + "; ".join(map(str, refused)),
            where=", ".join(c.key for c in refused),
            remedy=f"restore them{before and f' ({before})'}, or go on regardless with {' '.join(overrides)}, or start "
            "a new run",
        )


def report(changes: Sequence[Change], force: Collection[str] = (), *, restart: bool = False) -> list[str]:
    """A line a change, to be printed when a run is resumed."""
    return [f"{'forced' if c.kind == 'refused' and c.forced_by(force, restart) else c.kind:8}{c}" for c in changes]


def _inside(key: str, start: str) -> bool:
    return key == start or key.startswith(f"{start}.")


class _Leaf(NamedTuple):
    value: Any
    meaning: Meaning


_NOTHING = _Leaf(None, FROM_HERE_ON)


def _leaves(hint: Any, value: Any, path: str, meaning: Meaning) -> Iterator[tuple[str, _Leaf]]:
    """(dotted key, leaf) of all settings in `value`, whose type is `hint`, place `path`, and meaning, as far as the
    settings inside have none of their own, `meaning`. Sections have their defaults filled in; lists are leaves."""
    if dataclasses.is_dataclass(hint):
        yield from _section(hint, _mapping(value), path, meaning)
    elif isinstance(value, Mapping):
        inside = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else Any
        for key, item in value.items():
            yield from _leaves(inside, item, f"{path}.{key}", meaning.of_key(str(key)))
    else:
        yield path, _Leaf(list(value) if isinstance(value, tuple) else value, meaning)


def _section(cls: Any, tree: Mapping[str, Any], path: str, meaning: Meaning) -> Iterator[tuple[str, _Leaf]]:
    hints = typing.get_type_hints(cls)
    fields = {field.metadata.get("key", field.name): field for field in dataclasses.fields(cls)}
    options: Mapping[str, Any] = {}
    if TARGET in fields and any(field.metadata.get("rest") for field in fields.values()):
        options = defaults(tree.get(TARGET, fields[TARGET].default))
    for key in dict.fromkeys([*tree, *options, *fields]):
        field, place = fields.get(key), f"{path}.{key}" if path else key
        if field is None:  # an option of the class that the section names, or of another version
            default, metadata = options.get(key, (None, {}))
            yield from _leaves(Any, tree.get(key, default), place, metadata.get(ON_RESUME, meaning))
            continue
        hint, value = hints[field.name], tree.get(key, field.default)
        if value is not dataclasses.MISSING or dataclasses.is_dataclass(hint):
            yield from _leaves(hint, value, place, field.metadata.get(ON_RESUME, meaning))


def _mapping(value: Any) -> Mapping[str, Any]:
    """A checkpoint of another version may hold anything at any place."""
    return value if isinstance(value, Mapping) else {}
