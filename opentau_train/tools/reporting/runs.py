"""Run directories, read for a report: numbers, settings, checkpoints, quarantine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from opentau_train import strangers
from opentau_train.errors import UserError
from opentau_train.pages.charts import Curve
from opentau_train.sinks.jsonl import ABOUT, FILE, read_rows

LOSS = "Validation/Loss"
"""The held-out loss: what a sweep minimises, too."""
FLIGHT = "flight"
"""Where the flight recorder writes (`metrics/recorder.py`, which takes torch)."""
OWN = ("paths.run_dir",)
"""Settings that every run has for itself."""
MOST_LINES = 100_000
"""Of a quarantine that are counted."""
HOUR = 3600.0


@dataclass(frozen=True)
class Run:
    """A run directory. `rows` {step: {tag: number}} by rising step; `settings` {dotted key: value}, none where
    config.yaml isn't there."""

    name: str
    folder: Path
    number: int
    rows: dict[int, dict[str, Any]] = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)

    @cached_property
    def tags(self) -> dict[str, None]:
        """All tags, in the order in which they came first."""
        return dict.fromkeys(tag for row in self.rows.values() for tag in row if tag not in ABOUT)

    @cached_property
    def _hours(self) -> dict[int, float]:
        """{step: hours}: what the run took so far, without what lay between its attempts."""
        hours, spent, before = {}, 0.0, (None, 0.0)
        for step, row in self.rows.items():
            attempt, now = row.get("attempt"), float(row.get("time") or 0.0)
            spent += max(0.0, now - before[1]) if attempt == before[0] else 0.0
            hours[step], before = spent / HOUR, (attempt, now)
        return hours

    @cached_property
    def _epochs(self) -> tuple[list[int], list[float]]:
        pairs = [(s, row["Training/Epoch"]) for s, row in self.rows.items() if row.get("Training/Epoch") is not None]
        return [step for step, _ in pairs], [epoch for _, epoch in pairs]

    def curve(self, tag: str, name: str = "", scale: float = 1.0) -> Curve | None:
        """The tag's values over all three axes, times `scale`; with its standard errors, where it has any. None where
        the run has no such tag."""
        steps = [step for step, row in self.rows.items() if tag in row]
        if not steps:
            return None
        values = [_scaled(self.rows[step][tag], scale) for step in steps]
        errors = [_scaled(self.rows[step].get(f"{tag}/StdErr"), scale) for step in steps]
        x = {"step": [float(step) for step in steps], "hours": [self._hours[step] for step in steps]}
        if self._epochs[0]:
            x["epoch"] = np.interp(steps, *self._epochs).tolist()
        return Curve(self.number, x, values, errors if any(errors) else [], name)

    def last(self, tag: str) -> float | None:
        """The tag's last value that is a number."""
        return next((row[tag] for row in reversed(self.rows.values()) if row.get(tag) is not None), None)

    def lowest(self, tag: str = LOSS) -> tuple[float, int] | None:
        """(the tag's lowest value, its step)."""
        return min(((row[tag], step) for step, row in self.rows.items() if row.get(tag) is not None), default=None)

    def median(self, tag: str) -> float | None:
        values = [row[tag] for row in self.rows.values() if row.get(tag) is not None]
        return float(np.median(values)) if values else None

    @property
    def hours(self) -> float:
        return max(self._hours.values(), default=0.0)

    @property
    def attempts(self) -> int:
        return len({row.get("attempt", 1) for row in self.rows.values()})

    def checkpoints(self) -> list[tuple[str, list[str]]]:
        """(name, what points to it: last, best, lowest) of every checkpoint, oldest first."""
        folder = self.folder / "checkpoints"
        if not folder.is_dir():
            return []
        entries = sorted(folder.iterdir())
        links = {p.name: p.resolve().name for p in entries if p.is_symlink()}
        names = [p.name for p in entries if p.name.isdigit() and p.is_dir()]
        return [(name, [link for link, target in links.items() if target == name]) for name in names]

    def flight_files(self) -> list[Path]:
        """The files of the flight recorder, which knows the samples of each step."""
        return sorted((self.folder / FLIGHT).glob("*.jsonl"))

    def quarantine(self) -> list[dict[str, Any]]:
        """The windows that couldn't be read, a mapping each; a line that a kill cut off is left out."""
        path = self.folder / "quarantine.jsonl"
        if not path.is_file():
            return []
        lines = []
        with open(path, encoding="utf-8", errors="replace") as file:
            for line, _ in zip(file, range(MOST_LINES), strict=False):
                try:
                    tree = json.loads(line)
                except ValueError:
                    continue
                lines += [tree] if isinstance(tree, dict) else []
        return lines


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """The runs in these directories, or in those one level below where a directory is no run itself; and the
    directories that hold none. Raises `UserError` where none does."""
    places, passed = [], []
    for folder in folders:
        inside = [folder] if (folder / FILE).is_file() else _below(folder)
        places += inside
        passed += [] if inside else [folder]
    if not places:
        raise UserError(
            f"no numbers there: no {FILE} in {', '.join(map(str, folders[:4]))}",
            where="RUN",
            remedy="give run directories, or the directory of a sweep",
        )
    places = list(dict.fromkeys(place.absolute() for place in places))
    names = _names(places)
    return [_read(place, name, number) for number, (place, name) in enumerate(zip(places, names, strict=True))], passed


def _below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    try:
        found = [path for path in folder.iterdir() if (path / FILE).is_file()]
    except OSError as error:
        raise UserError(f"can't look into {folder}: {error.strerror}", where="RUN") from error
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _names(places: Sequence[Path]) -> list[str]:
    """The places' last parts, as many as tell them apart, and more than a number."""
    for depth in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names) and not all(name.isdigit() for name in names):
            return names
    return [str(place) for place in places]


def _read(folder: Path, name: str, number: int) -> Run:
    try:
        rows = read_rows(folder)
    except OSError as error:
        raise UserError(f"no numbers there: {error}", where=str(folder), remedy="give a run directory") from error
    if not rows:
        raise UserError("the run has written no numbers yet", where=str(folder / FILE), remedy="wait for its first row")
    path = folder / "config.yaml"
    settings: dict[str, Any] = {}
    if path.is_file():
        try:
            settings = dict(_flat(yaml.safe_load(strangers.read_bytes(path))))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"the settings can't be read: {error}", where=str(path), remedy="restore it") from error
    return Run(name, folder, number, rows, {k: v for k, v in settings.items() if k not in OWN})


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the leaves; a list is one."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, tree


ABSENT = object()
"""The value of a setting that a run hasn't."""


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """{key: its value in each run, `ABSENT` where it hasn't it} of the settings that aren't the same in all runs with
    settings. A source that only some have is one row.
    """
    told = [run for run in runs if run.settings]
    values: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for run in told for key in run.settings):
        source = ".".join(key.split(".")[:3]) if key.startswith("data.sources.") else ""
        has = [any(k.startswith(f"{source}.") for k in run.settings) for run in told] if source else [True]
        if not all(has):
            values[source] = [_presence(run, source) for run in runs]
        else:
            values[key] = [run.settings.get(key, ABSENT) for run in runs]
    first = [run.number for run in told]
    return {key: of for key, of in values.items() if any(of[i] != of[first[0]] for i in first)}


def _presence(run: Run, source: str) -> Any:
    return "present" if any(key.startswith(f"{source}.") for key in run.settings) else ABSENT
