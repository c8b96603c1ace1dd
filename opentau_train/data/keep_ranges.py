"""The keep-ranges filter: which windows of an episode may be trained on, from a JSON file of frame ranges.

Two public forms, ranges half-open and in frames:

    {"KEY": [[start, end], ...], ...}
    {"metadata": {"filter_last_n_in_ranges": 10}, "keep_ranges": {"KEY": [[start, end], ...], ...}}

In the second one a reader takes `filter_last_n_in_ranges` frames off each range's end. Keys are episode numbers, or
texts that a template makes of an episode's metadata (`{recording_folderpath}--{file_path}`).
`python -m opentau_train.tools.keep_ranges` computes such a file.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.errors import UserError, check_machine

Ranges = list[tuple[int, int]]
MOST_BYTES = 256 * 2**20
TRIM_KEY = "filter_last_n_in_ranges"


@dataclass(frozen=True)
class KeepRanges:
    """A filter file: {key: ranges}, each key's sorted, disjoint and without its trimmed tail. `trimmed` frames were
    taken off each range as written; `by_number` says that all keys are whole numbers; `digest` hashes the content."""

    path: Path
    ranges: Mapping[str, Ranges]
    trimmed: int
    by_number: bool
    digest: str

    def numbered(self) -> KeepRanges:
        """The same filter with its keys written as episode numbers are: 7 for 007."""
        return replace(self, ranges={str(int(key)): ranges for key, ranges in self.ranges.items()})


@dataclass(frozen=True)
class FilterReport:
    """What a filter did to a dataset. `lost` {cause: windows}; `num_cut` ranges reach past their episode's end."""

    num_keys: int
    num_episodes: int
    num_matched: int
    num_dropped: int
    num_windows: int
    num_kept: int
    lost: Mapping[str, int]
    num_cut: int

    def text(self, name: str, filter: KeepRanges, keyed_by: str) -> str:
        """The report as the lines of a log; `keyed_by` tells what an episode's key is."""
        share = self.num_kept / max(1, self.num_windows)
        lines = [
            f"keep-ranges filter of '{name}': {filter.path} ({filter.digest[:12]}), by {keyed_by}",
            f"  episodes: {self.num_matched} of {self.num_episodes} found among {self.num_keys} keys, "
            f"{self.num_dropped} dropped",
            f"  windows:  {self.num_kept} of {self.num_windows} kept ({share:.1%})",
            *(f"  lost:     {count} {cause}" for cause, count in self.lost.items() if count),
        ]
        if filter.trimmed:
            lines.append(f"  each range's last {filter.trimmed} frames are left out")
        if self.num_cut:
            lines.append(f"  {self.num_cut} ranges reach past their episode's end and were cut there")
        return "\n".join(lines)


def file_digest(path: Path) -> str:
    """A hash of the file's bytes."""
    return hashlib.blake2b(strangers.read_bytes(path, MOST_BYTES), digest_size=16).hexdigest()


def read(path: Path, where: str, trim: int | None = None) -> KeepRanges:
    """Read a filter file. `trim` frames come off each range's end; None = as its metadata say.

    Raises `UserError` for a file that is missing, not JSON, or neither of the two forms.
    """
    try:
        raw = strangers.read_bytes(path, MOST_BYTES)
        tree = strangers.parse(raw)
    except FileNotFoundError as error:
        raise UserError(
            f"the filter file {path} doesn't exist",
            where=f"{where}.filter_dict_path",
            remedy=f"make one (python -m opentau_train.tools.keep_ranges), or set {where}.use_filter_dict=false",
        ) from error
    except (OSError, ValueError) as error:
        check_machine(error, path)
        raise _broken(path, f"can't be read: {error}") from error
    if not isinstance(tree, dict):
        raise _broken(path, "holds no mapping")
    metadata: Any = {}
    if isinstance(tree.get("keep_ranges"), dict):
        metadata, tree = tree.get("metadata") or {}, tree["keep_ranges"]
    if not tree:
        raise _broken(path, "has no key")
    if trim is None:
        trim = metadata.get(TRIM_KEY, 0) if isinstance(metadata, dict) else 0
        if not _is_whole(trim) or trim < 0:
            raise _broken(path, f"metadata.{TRIM_KEY} is {trim!r}, not a number of frames")
        trim = int(trim)
    ranges = {key: _clean(key, entry, trim, path) for key, entry in tree.items()}
    by_number = all(key.isascii() and key.isdigit() for key in tree)
    return KeepRanges(path, ranges, trim, by_number, hashlib.blake2b(raw, digest_size=16).hexdigest())


def _clean(key: str, entry: Any, trim: int, path: Path) -> Ranges:
    """The ranges of the file's `entry` for a key, trimmed, sorted, and joined where they overlap or touch: one block is
    one run of windows."""
    joined: Ranges = []
    try:
        pairs = [(start, end) for start, end in entry]
    except (TypeError, ValueError) as error:
        raise _broken(path, f"key '{key}' holds no list of [start, end] pairs") from error
    for bound in (bound for pair in pairs for bound in pair):
        if not _is_whole(bound):
            raise _broken(path, f"key '{key}' has the bound {bound!r}, not a whole number of frames")
    for start, end in sorted((int(start), int(end)) for start, end in pairs):
        if start < 0 or end < start:
            raise _broken(path, f"key '{key}' has the range [{start}, {end}]")
        end -= trim
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _is_whole(value: Any) -> bool:
    """Whether JSON's `value` is a whole number: 3.0 is one; NaN, Infinity and true, Python's 1, are none."""
    return value.is_integer() if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)


def _broken(path: Path, what: str) -> UserError:
    return UserError(
        f"the filter file {what}",
        where=str(path),
        remedy='write {"KEY": [[start, end], ...]} or {"metadata": {...}, "keep_ranges": {...}}, half-open, in frames',
    )


def template_fields(template: str, where: str) -> tuple[str, ...]:
    """The names between a key template's braces. Raises `UserError` for a template that is none."""
    try:
        parts = [p for p in string.Formatter().parse(template) if p[1] is not None]
    except ValueError as error:
        parts, problem = [], f": {error}"
    else:
        problem = " has no {name} in it" if not parts else ""
    if problem or any(not name or spec or conversion for _, name, spec, conversion in parts):
        raise UserError(
            f"the key template '{template}'{problem or ' may hold plain {name} fields only'}",
            where=f"{where}.filter_key",
            remedy="name per-episode columns, e.g. {recording_folderpath}--{file_path} or {episode_id}",
        )
    return tuple(dict.fromkeys(str(name) for _, name, _, _ in parts))


def never_a_number(template: str) -> bool:
    """Whether no episode's values make a whole number of the key template."""
    return any(text and not text.isdigit() for text, *_ in string.Formatter().parse(template))


def fill_template(template: str, columns: Mapping[str, Sequence[Any]], num: int) -> list[str]:
    """The keys of `num` episodes: the template with each episode's values. Names may hold dots."""
    parts = list(string.Formatter().parse(template))
    return [
        "".join(text + ("" if name is None else str(columns[name][i])) for text, name, _, _ in parts)
        for i in range(num)
    ]


def apply(
    filter: KeepRanges,
    keys: list[str],
    length: NDArray[np.int32],
    *,
    rule: Literal["start", "whole"],
    rows: int,
) -> tuple[NDArray[np.int32], FilterReport]:
    """(blocks [N, 3] int32 (episode position, first frame, windows), the report) of episodes with `keys` and `length`.

    `start`: a window starts inside a range. `whole`: the `rows` rows of its chunk lie inside it too.
    """
    blocks: list[tuple[int, int, int]] = []
    lost = {"in episodes that the file doesn't name": 0, "outside the ranges": 0}
    at_end = "whose chunk leaves its range (filter_rule=whole)"
    lost[at_end] = matched = dropped = cut = 0
    for position, (key, frames) in enumerate(zip(keys, length.tolist(), strict=True)):
        ranges = filter.ranges.get(key)
        if ranges is None:
            lost["in episodes that the file doesn't name"] += frames
            dropped += 1
            continue
        matched += 1
        before = len(blocks)
        inside = 0
        for start, end in ranges:
            cut += end > frames
            end = min(end, frames)
            inside += max(0, end - start)
            num = end - start - (rows - 1 if rule == "whole" else 0)
            if num > 0:
                blocks.append((position, start, num))
        lost["outside the ranges"] += frames - inside
        lost[at_end] += inside - sum(b[2] for b in blocks[before:])
        dropped += len(blocks) == before
    out = np.array(blocks, np.int32).reshape(-1, 3)
    total = int(length.sum(dtype=np.int64))
    kept = int(out[:, 2].sum(dtype=np.int64))
    return out, FilterReport(
        num_keys=len(filter.ranges),
        num_episodes=len(keys),
        num_matched=matched,
        num_dropped=dropped,
        num_windows=total,
        num_kept=kept,
        lost=lost,
        num_cut=cut,
    )


def check(filter: KeepRanges, keys: list[str], report: FilterReport, min_match: float, where: str) -> None:
    """Raises `UserError` where keys name several episodes, too few episodes are in the file, or nothing is left."""
    if len(set(keys)) < len(keys):
        twice = next(k for k, n in _counts(keys).items() if n > 1)
        raise UserError(
            f"several episodes have the filter key '{twice}'",
            where=f"{where}.filter_key",
            remedy="use a template that tells episodes apart, or a filter file keyed by episode number",
        )
    if report.num_matched < min_match * report.num_episodes:
        present = set(keys)
        absent = next(key for key in keys if key not in filter.ranges)
        stray = next((key for key in filter.ranges if key not in present), None)
        raise UserError(
            f"only {report.num_matched} of {report.num_episodes} episodes are in the filter file: it lacks the key "
            f"'{absent}'" + ("" if stray is None else f", and its key '{stray}' is no episode's"),
            where=f"{where}.filter_dict_path",
            remedy=f"check the file and {where}.filter_key, or lower {where}.filter_min_match ({min_match:g})",
        )
    if report.num_kept == 0:
        raise UserError(
            "the filter leaves no window",
            where=f"{where}.filter_dict_path",
            remedy=f"check the ranges, {where}.filter_rule and chunk_length",
        )


def _counts(keys: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts
