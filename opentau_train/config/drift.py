"""What a resumed run may change: the settings that differ from the checkpoint's, each safe, warned or refused.

- safe: changes no number of the training (paths, loggers, workers, layout of ranks, when to save or validate);
- warned: changes the training from here on, as was perhaps meant (learning rate, schedule, weight decay, dropout);
- refused: what was trained so far wouldn't fit any more. A changed data plan (seed, global batch, mixture) is forced
  by `resume.data=restart`; others (shapes, normalisation) by `resume.force`, which lists keys or the start of them, up
  to a dot.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from opentau_train.config.data import SourceSettings
from opentau_train.config.settings import Settings
from opentau_train.errors import UserError

Kind = Literal["safe", "warned", "refused"]

_PLAN = "the data plan changes"
_SHAPES_WHY = "the weights were trained for it; none can be loaded whose shape changes"

RULES: tuple[tuple[str, Kind, str], ...] = (
    ("name", "safe", ""),
    ("resume", "safe", ""),
    ("resume.*", "safe", ""),
    ("paths.*", "safe", ""),
    ("logger.*", "safe", ""),
    ("flight_recorder", "safe", ""),
    ("checkpoint.*", "safe", ""),
    ("parallelism.*", "safe", ""),
    ("validation.every", "safe", ""),
    ("validation.batch_size", "safe", ""),
    ("validation.*", "warned", "validation numbers don't compare to those before"),
    ("trainer.log_every", "safe", ""),
    ("trainer.step_timeout", "safe", ""),
    ("trainer.stop_after", "safe", ""),
    ("trainer.max_skipped_steps", "safe", ""),
    ("trainer.profile_steps", "safe", ""),
    ("trainer.compile*", "safe", ""),
    ("trainer.device", "safe", ""),
    ("trainer.global_batch_size", "refused", _PLAN),
    ("trainer.steps", "warned", "the schedule is stretched to the new length"),
    ("trainer.*", "warned", "from here on"),
    ("optimizer.*", "warned", "from here on"),
    ("scheduler.*", "warned", "from here on"),
    ("seed", "refused", _PLAN),
    ("data.num_workers", "safe", ""),
    ("data.prefetch_factor", "safe", ""),
    ("data.max_samples_per_batch", "safe", ""),
    ("data.bad_samples.*", "safe", ""),
    ("data.correlation.*", "safe", ""),
    # What lies there is compared by itself, with the tape's state.
    ("data.sources.*.root", "safe", ""),
    ("data.sources.*.filter_dict_path", "safe", ""),
    ("data.sources.*.filter_min_match", "safe", ""),
    ("data.sources.*.val_*", "warned", "the held-out episodes themselves are compared"),  # by data/split.py
    ("data.sources.*.mode", "warned", "other losses supervise the source from here on"),
    ("data.sources.*.tolerance_s", "safe", ""),
    ("data.sources.*.prompt_*", "warned", "other prompts from here on"),
    ("data.dropout.*", "warned", "from here on"),
    ("data.blank_images", "warned", "from here on"),
    ("data.lanes_per_sample", "refused", _PLAN),
    ("data.sample_stride", "refused", _PLAN),
    ("data.drop_tail", "refused", _PLAN),
    ("data.builtin_sample", "refused", _PLAN),
    ("data.phase_rows", "refused", _PLAN),
    ("data.sources.*", "refused", _PLAN),
    ("data.normalization", "refused", "the policy was trained on inputs normalised otherwise"),
    ("data.*", "refused", _SHAPES_WHY),
    ("model.*_weight", "warned", "the losses' weights from here on"),
    ("model.num_flow_steps", "safe", ""),
    ("model.*", "refused", _SHAPES_WHY),
    ("*", "warned", "from here on"),
)
"""(pattern of the key, kind, what the change means); the first that fits decides."""


@dataclass(frozen=True)
class Change:
    """One setting that differs; None stands for a key that isn't there."""

    key: str
    old: Any
    new: Any
    kind: Kind
    why: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}" + (f" ({self.why})" if self.why else "")

    @property
    def of_plan(self) -> bool:
        """Whether the order of the samples depends on it."""
        return self.why == _PLAN

    def forced_by(self, force: Collection[str], restart: bool) -> bool:
        """Whether `resume.force` or `resume.data=restart` allow it."""
        return restart if self.of_plan else any(_inside(self.key, start) for start in force)


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The differences between the checkpoint's configuration tree and the run's, in the order of `now`.

    A key that only one tree has counts with its default: a newer program may have settings that an older one hadn't.
    """
    old, new = (dict(_flat(_filled(Settings, tree))) for tree in (saved, now))
    changes = []
    sources = [set(_mapping(_mapping(tree.get("data")).get("sources"))) for tree in (saved, now)]
    for name in sorted(sources[0] ^ sources[1]):
        said = ["present" if name in names else "absent" for names in sources]
        changes.append(Change(f"data.sources.{name}", said[0], said[1], "refused", _PLAN))
    alone = tuple(f"{c.key}." for c in changes)
    for key in [*new, *(k for k in old if k not in new)]:
        before, after = old.get(key), new.get(key)
        if before != after and not key.startswith(alone):
            changes.append(Change(key, before, after, *_judge(key, before, after, new)))
    return changes


def check(changes: Sequence[Change], force: Collection[str] = (), *, restart: bool = False) -> None:
    """Raises `UserError` with the refused changes that neither `force` names nor `restart` allows, and with the
    overrides that would."""
    refused = [c for c in changes if c.kind == "refused" and not c.forced_by(force, restart)]
    if refused:
        keys = [c.key for c in refused if not c.of_plan]
        plan = ["resume.data=restart"] if any(c.of_plan for c in refused) else []
        overrides = [*plan, *(["resume.force=[" + ",".join(dict.fromkeys([*force, *keys])) + "]"] if keys else [])]
        raise UserError(
            "settings differ from the checkpoint's: " + "; ".join(map(str, refused)),
            where=", ".join(c.key for c in refused),
            remedy=f"restore them, or go on regardless with {' '.join(overrides)}, or start a new run",
        )


def report(changes: Sequence[Change], force: Collection[str] = (), *, restart: bool = False) -> list[str]:
    """A line a change, to be printed when a run is resumed."""
    return [f"{'forced' if c.kind == 'refused' and c.forced_by(force, restart) else c.kind:8}{c}" for c in changes]


def _judge(key: str, old: Any, new: Any, now: Mapping[str, Any]) -> tuple[Kind, str]:
    if key == "trainer.ema_decay" and (old is None or new is None):
        return (
            "refused",
            "the average isn't in the checkpoint: it begins here" if old is None else "the average is lost",
        )
    if key == "trainer.steps" and str(now.get("scheduler._target_")).endswith(".Constant") and new > old:
        return "safe", ""
    return next((kind, why) for pattern, kind, why in RULES if fnmatchcase(key, pattern))


def _inside(key: str, start: str) -> bool:
    return key == start or key.startswith(f"{start}.")


def _filled(cls: Any, tree: Any) -> dict[str, Any]:
    """`tree` with the defaults of the settings class `cls` where it has no key, and of the classes inside."""
    filled, hints = dict(_mapping(tree)), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = field.metadata.get("key", field.name), hints[field.name]
        if dataclasses.is_dataclass(hint):
            filled[key] = _filled(hint, filled.get(key))
        elif hint == dict[str, SourceSettings]:
            filled[key] = {name: _filled(SourceSettings, source) for name, source in _mapping(filled.get(key)).items()}
        elif key not in filled and field.default is not dataclasses.MISSING:
            filled[key] = field.default
    return filled


def _mapping(value: Any) -> Mapping[str, Any]:
    """A checkpoint of another version may hold anything at any place."""
    return value if isinstance(value, Mapping) else {}


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the leaves; lists are leaves, tuples read as lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", list(value) if isinstance(value, tuple) else value
