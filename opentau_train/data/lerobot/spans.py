"""Which frames of a video are an episode's own. Pure: seconds in, seconds out.

In a file that holds several episodes a frame beyond the episode's end is another one's picture: a row whose frame would
lie there has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.decode.video_file import Clock, VideoError

F64 = NDArray[np.float64]

EVER = (-math.inf, math.inf)
_INSIDE = 0.25
"""Of a frame: how far beyond its first and last frame an episode's rows may ask. Nearer than half a frame, so that
rounding never makes the neighbour's frame the nearest one."""
_SAME_RATE = 0.05
"""By how much a file with a frame for each row may last longer or shorter than they do: clocks of 29 and 30 fps are
apart by less, a file that was encoded at another rate by more."""
_REORDERED = 4
"""Frames by which a file's duration, told by decode times, may be wrong where its frames are uneven; of a short one at
most a quarter."""


@dataclass(frozen=True)
class Span:
    """One episode's frames of a camera, in seconds of the file's clock: those shown from `first` to before `end`; rows
    count from `start`. `claimed`: from when to when the metadata place episodes in the file, `rows` how many rows
    they have, `sharing` how many they are; 0 where the format gives each a file, whose frames are all its own."""

    path: Path
    start: float
    first: float
    end: float
    claimed: tuple[float, float]
    rows: int
    sharing: int


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of an episode's rows are shown in the file: `seconds` [L], which rows are `beyond` [L] by so many
    seconds, more than the tolerance for those that are `lost` [L]; a frame shown before `low` or from `high` on is none
    of the episode's. `excess`: how much longer the file lasts than the episodes that the metadata place in it."""

    seconds: F64
    beyond: F64
    lost: NDArray[np.bool_]
    low: float
    high: float
    excess: float = 0.0


def boundaries(file: NDArray[np.int32], start: F64, to: F64, length_s: F64, frame_s: float) -> tuple[F64, F64]:
    """(`first`, `end`) [E] of the episodes' spans, given their `file`s, from_timestamps `start`, to_timestamps `to`
    (NaN: not told) and durations `length_s`, each [E]; a frame takes `frame_s`.

    An episode ends at its `to`, and at the next one's start. Frames that two episodes claim are the later one's, unless
    it may have room for all of its rows without them: then its start may be wrong, and they are nobody's. Where two
    have the same start, one of them is wrong, and neither has frames.
    """
    rises = (np.diff(file) > 0) | ((np.diff(file) == 0) & (np.diff(start) >= 0))
    order = np.arange(len(file)) if rises.all() else np.lexsort((start, file))
    half = frame_s / 2
    first, end = start[order].copy(), np.where(to > start, to, np.inf)[order]
    follows = np.append(file[order][1:] == file[order][:-1], False)
    limit = np.where(follows, np.append(first[1:], np.inf), np.inf)
    early, late = np.flatnonzero(follows), np.flatnonzero(follows) + 1
    told = np.where(np.isfinite(end[early]), end[early], -np.inf)
    start_wrong = (told > first[late] + half) & (limit[late] - told > length_s[order][late] - half)
    end[early], first[late] = np.minimum(first[late], end[early]), np.where(start_wrong, told, first[late])
    lasts = length_s[order] > half
    same = (start[order][late] - start[order][early] < half) & lasts[early] & lasts[late]
    unknown = np.union1d(early[same], late[same])
    end[unknown] = first[unknown]
    back = np.argsort(order)
    return first[back], end[back]


def frame_times(span: Span, seconds: F64, clock: Clock, frame_s: float, tolerance_s: float) -> FrameTimes:
    """Where the frames of rows at `seconds` [L] of the episode are, in a file of the clock `clock`; rows are `frame_s`
    apart.

    A clock that begins elsewhere than the metadata or the rows assume is followed where the file holds exactly as many
    frames as they say. Raises `VideoError` where no row's frame can be told for certain.
    """
    half = frame_s / 2
    claimed_first, claimed_end = span.claimed
    lasts = clock.last + frame_s - clock.first
    excess = lasts - (claimed_end - claimed_first)
    exact = clock.frames == span.rows if clock.frames else abs(excess) < half
    if clock.frames == span.rows:
        _check_rate(span, seconds, lasts, frame_s)
    if span.sharing == 0:
        none = np.zeros(len(seconds))
        return FrameTimes(_alone(span, seconds, clock, half, exact, tolerance_s), none, none > 0, *EVER)
    if span.sharing > 1 and excess < -half and not 0 < span.rows <= clock.frames:
        raise VideoError(
            f"{span.path} lasts {lasts:.3f} s, and meta/episodes place "
            f"{claimed_end - claimed_first:.3f} s of episodes in it: which of them are shorter isn't known"
        )
    exact &= abs(excess) < half
    late = clock.first - claimed_first
    shift = late if exact and abs(late) > tolerance_s else 0.0
    wanted = span.start + shift + seconds
    low, high = span.first + shift - half, span.end + shift - half
    if abs(seconds[0]) > half and (wanted[0] < low or wanted[-1] > high):
        if not exact:
            raise VideoError(_runs_on(span, seconds))
        wanted -= seconds[0]
    inside = _INSIDE * frame_s
    asked = np.clip(wanted, low + half - inside, high - half + inside)
    beyond = np.abs(asked - wanted)
    return FrameTimes(asked, beyond, beyond > tolerance_s, low, high, excess)


def _check_rate(span: Span, seconds: F64, lasts: float, frame_s: float) -> None:
    """Raises `VideoError` where a file that has a frame for each row, and `lasts` seconds, shows them at another rate
    than the rows': by time a row would be shown another one's picture."""
    own = seconds[-1] - seconds[0] + frame_s
    if span.sharing == 0:
        _refuse_rate(span, [(lasts, own)], frame_s)
        return
    first, end = span.claimed
    _refuse_rate(span, [(lasts, end - first), (lasts, span.rows * frame_s)], frame_s)
    # A span that is too short has lost frames; rows of another rate than the dataset's are too fast or slow for it.
    _refuse_rate(span, [(min(span.end, end) - span.first, own), (len(seconds) * frame_s, own)], frame_s)


def _refuse_rate(span: Span, told: Sequence[tuple[float, float]], frame_s: float) -> None:
    """Raises `VideoError` if the seconds of video and of rows are apart in each pair of `told`."""
    if all(abs(video - rows) > max(min(_REORDERED * frame_s, rows / 4), _SAME_RATE * rows) for video, rows in told):
        video, rows = told[0]
        raise VideoError(
            f"{span.path} has a frame for each row, but they are shown for {video:.3f} s and the rows last {rows:.3f} "
            "s: by time a row would be shown another one's picture"
        )


def _alone(span: Span, seconds: F64, clock: Clock, half: float, exact: bool, tolerance_s: float) -> F64:
    """[L] when the rows' frames are shown in a file that is the episode's alone. Raises `VideoError`."""
    wanted = span.start + seconds
    late = clock.first - wanted[0]
    if abs(late) <= tolerance_s:
        return wanted
    if exact:  # the first row's frame is the first
        return wanted + late
    if late > half and abs(clock.last + 2 * half - span.claimed[1]) > half:
        raise VideoError(f"{span.path} begins at {clock.first:.3f} s, after the first row's time, {wanted[0]:.3f} s")
    if late < -half and wanted[-1] > clock.last + half:
        raise VideoError(_runs_on(span, seconds))
    return wanted


def _runs_on(span: Span, seconds: F64) -> str:
    return f"{span.path}: the rows' times, {seconds[0]:.3f} to {seconds[-1]:.3f} s, begin and end outside the episode's"


def enough(drift_s: float) -> str:
    """A tolerance that takes a drift, in two digits."""
    unit = 10.0 ** (math.floor(math.log10(max(drift_s, 1e-9))) - 1)
    return f"{math.ceil(drift_s / unit + 1e-6) * unit:.2g}"
