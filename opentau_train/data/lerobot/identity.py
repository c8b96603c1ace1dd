"""How to tell whether it is the same dataset: hashes of a LeRobot dataset's metadata and files, without reading the
files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from opentau_train.data.lerobot.episodes import StoredEpisodes
from opentau_train.data.lerobot.info import Info
from opentau_train.machine import check_machine

MAX_ENDS = 128
"""Files of rows whose ends are part of the fingerprint, evenly chosen: parquet keeps its columns' extremes there."""
END_BYTES = 32_768
STATS_A_TURN = 500
"""Files whose status one thread asks for before it takes others."""


def identify(info: Info, stored: StoredEpisodes) -> tuple[str, str]:
    """(`fingerprint`, `rows_stamp`) of the dataset, see `Source`.

    The fingerprint hashes the metadata, the episodes, the sizes of their files and the ends of some files of rows, so
    that a dataset that was recorded, encoded or computed again has another one. The stamp hashes when the files of rows
    were written.
    """
    digest = hashlib.blake2b(info.raw, digest_size=16)
    table = stored.table
    for column in (table.episode_index, table.length, table.control_mode, stored.data_file, stored.row_start):
        digest.update(np.ascontiguousarray(column).tobytes())
    for camera, places in stored.videos.items():
        digest.update(camera.encode() + places.file.tobytes() + places.start.tobytes())
    relative = [stored.data.relative(number) for number in np.unique(stored.data_file).tolist()]
    num_data = len(relative)
    for places in stored.videos.values():
        relative += [places.files.relative(number) for number in np.unique(places.file).tolist()]
    stats = file_stats([f"{info.root}/{name}" for name in relative])
    for name, stat in zip(relative, stats, strict=True):
        digest.update(f"{name}\x1f{stat.size}\x1e".encode())
    for path in relative[: num_data : -(-num_data // MAX_ENDS)]:
        digest.update(end_of(f"{info.root}/{path}"))
    written = repr([stat.modified for stat in stats[:num_data]])
    return digest.hexdigest(), hashlib.blake2b(written.encode(), digest_size=16).hexdigest()


class FileStat(NamedTuple):
    """A file's bytes, and its modification time in nanoseconds; -1 for a file that can't be had."""

    size: int
    modified: int


def file_stats(paths: Sequence[str]) -> list[FileStat]:
    """The size and the modification time of each file. The episodes of a file that can't be had are bad samples,
    noticed when they are read.

    Asked for on several threads: a dataset of a file an episode has hundreds of thousands, and a file server answers
    each in its own time.
    """

    def stat_all(part: Sequence[str]) -> list[FileStat]:
        return [_stat(path) for path in part]

    parts = [paths[i : i + STATS_A_TURN] for i in range(0, len(paths), STATS_A_TURN)]
    if len(parts) <= 1:
        return stat_all(paths)
    with ThreadPoolExecutor(16) as threads:
        return [stat for stats in threads.map(stat_all, parts) for stat in stats]


def end_of(path: str) -> bytes:
    """The file's last bytes, `END_BYTES` at most; none of a file that can't be had."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - END_BYTES))
            return file.read()
    except OSError as error:
        check_machine(error, path)
        return b""


def _stat(path: str) -> FileStat:
    try:
        status = os.stat(path)
    except OSError as error:
        check_machine(error, path)
        return FileStat(-1, -1)
    return FileStat(status.st_size, status.st_mtime_ns)
