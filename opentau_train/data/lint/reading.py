"""Reads the episodes that a source is judged by."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opentau_train.data.decode.parquet import numbers
from opentau_train.data.lerobot import rows
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.data.lint.cameras import histogram
from opentau_train.data.lint.sample import F64, EpisodeSample
from opentau_train.data.remote.mirror import mirror_at
from opentau_train.data.source import Source
from opentau_train.errors import BadSample
from opentau_train.types import WindowSpec

NUM_PICTURED = 24
"""Episodes at most of which a picture of each camera is decoded."""


def read_sample(source: Source, num: int) -> EpisodeSample:
    """Up to `num` episodes of the source, evenly over its table, with the first picture of some of them where it has
    several cameras. Where its files lie on a server, the first, the last and the longest episode, and no picture: their
    files would be fetched for it. Episodes whose rows can't be read, or aren't finite, are left out, and so are times
    that the source doesn't read. Raises `UserError` naming a file."""
    table, fetched, chosen = source.episodes, is_fetched(source), chosen_episodes(source, num)
    read = {p: (s, a) for p, s, a in source.columns(chosen) if np.isfinite(s).all() and np.isfinite(a).all()}
    places = sorted(read)
    return EpisodeSample(
        fps=source.fps,
        state_names=source.state_names,
        action_names=source.action_names,
        numbers=tuple(table.episode_index[places].tolist()),
        state=[read[p][0].astype(np.float64) for p in places],
        actions=[read[p][1].astype(np.float64) for p in places],
        seconds=_seconds(source, places) if isinstance(source, LeRobotDataset) and source.reading.timed else [],
        histograms={} if fetched or len(source.cameras) < 2 else _histograms(source, places),
    )


def is_fetched(source: Source) -> bool:
    """Whether the source's files lie on a server, and are fetched when they are read."""
    return isinstance(source, LeRobotDataset) and mirror_at(source.reading.root) is not None


def chosen_episodes(source: Source, num: int) -> NDArray[np.int64]:
    """The places of up to `num` episodes, evenly over the table; where its files are fetched, those of the first, the
    last and the longest."""
    last = len(source.episodes) - 1
    if is_fetched(source):
        return np.unique([0, last, int(np.argmax(source.episodes.length))])
    return np.linspace(0, last, min(num, last + 1)).round().astype(np.int64)


def _seconds(source: LeRobotDataset, places: list[int]) -> list[F64]:
    def take(table: pa.Table) -> F64:
        return numbers(table, "timestamp", 1, np.float64)[:, 0]

    times = rows.of_episodes(f"data.sources.{source.name}", source.reading.stored, places, ["timestamp"], take)
    return [seconds for _, seconds in times]


def _histograms(source: Source, places: list[int]) -> dict[str, F64]:
    """{camera: [E, K]} of each episode's first picture; NaN where it isn't read."""
    out = {camera: np.full((len(places), 256), np.nan) for camera in source.cameras}
    factory = source.cursors(WindowSpec(chunk_length=1, image_size=(64, 64)))
    cursor = factory.cursor()
    try:
        for i in np.linspace(0, len(places) - 1, min(NUM_PICTURED, len(places))).round().astype(int).tolist():
            try:
                images = cursor.read(places[i], 0).images
            except BadSample:
                continue  # a training names what it can't read
            for camera, pictures in images.items():
                out[camera][i] = histogram(pictures[0])
    finally:
        cursor.close()
        factory.close()
    return out
