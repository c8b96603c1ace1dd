"""How to tell whether it is the same dataset: hashes of a LeRobot dataset's metadata and files, without reading the
files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.data.lerobot.episodes import StoredEpisodes
from opentau_train.data.lerobot.files import FileTable
from opentau_train.data.lerobot.info import Info
from opentau_train.data.remote.mirror import mirror_at
from opentau_train.errors import UserError, check_machine

MAX_ENDS = 128
"""Files of rows whose ends are part of the fingerprint, evenly chosen: parquet keeps its columns' extremes there."""
END_BYTES = 32_768
STATS_A_TURN = 500
"""Files whose status one thread asks for before it takes others."""


class FileStat(NamedTuple):
    """A file's bytes, and its modification time in nanoseconds; -1 for a file that can't be had."""

    size: int
    modified: int


class StoredFile(NamedTuple):
    """A file of the episodes in use: the one with the place `number` among those of `camera`, or of the rows (None);
    `relative` is its path below the dataset's directory."""

    camera: str | None
    number: int
    relative: str
    stat: FileStat


def stored_files(info: Info, stored: StoredEpisodes) -> list[StoredFile]:
    """The files of the episodes in use: those of rows, then those of each camera."""
    kinds: list[tuple[str | None, FileTable, NDArray]] = [(None, stored.data, stored.data_file)]
    kinds += [(camera, places.files, places.file) for camera, places in stored.videos.items()]
    named = [
        (camera, n, files.relative(n))
        for camera, files, used in kinds
        for n in np.flatnonzero(np.bincount(used)).tolist()
    ]
    if mirror_at(info.root) is None:
        for _, _, relative in named:
            check_place(info, f"{info.root}/{relative}")
    stats = stats_below(info.root, [relative for _, _, relative in named])
    return [StoredFile(*name, stat) for name, stat in zip(named, stats, strict=True)]


def check_place(info: Info, path: str) -> None:
    """Raises `UserError` where a file of the dataset lies outside of its directory, the Hub's cache or what the setting
    `links` names."""
    try:
        strangers.check_inside(path, info.places)
    except strangers.Outside as error:
        remedy = f"if the link is your own, set {info.where}.links=[{error.folder}]"
        raise UserError(str(error), where=path, remedy=remedy) from error


def identify(info: Info, stored: StoredEpisodes, files: Sequence[StoredFile]) -> tuple[str, str]:
    """(`fingerprint`, `rows_stamp`) of the dataset, see `Source`. `files` are those of `stored`.

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
    for file in files:
        digest.update(f"{file.relative}\x1f{file.stat.size}\x1e".encode())
    rows = [file for file in files if file.camera is None]
    for end in _ends_below(info.root, [file.relative for file in rows[:: -(-len(rows) // MAX_ENDS)]]):
        digest.update(end)
    written = repr([file.stat.modified for file in rows])
    return digest.hexdigest(), hashlib.blake2b(written.encode(), digest_size=16).hexdigest()


def stats_below(root: Path, relative: Sequence[str]) -> list[FileStat]:
    """`file_stats` of files that are named by their paths below the dataset's directory, here or on a server."""
    mirror = mirror_at(root)
    if mirror is not None:
        return [FileStat(*stat) for stat in mirror.stats(relative)]
    return file_stats([f"{root}/{name}" for name in relative])


def _ends_below(root: Path, relative: Sequence[str]) -> list[bytes]:
    """`end_of` of files that are named by their paths below the dataset's directory, here or on a server."""
    mirror = mirror_at(root)
    return [end_of(f"{root}/{name}") for name in relative] if mirror is None else mirror.ends(relative, END_BYTES)


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
        strangers.check_plain(path)
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - END_BYTES))
            return file.read()
    except OSError as error:
        check_machine(error, path)
        return b""


def _stat(path: str) -> FileStat:
    try:
        status = os.stat(path)
    except ValueError:  # no file can have this name
        return FileStat(-1, -1)
    except OSError as error:
        check_machine(error, path)
        return FileStat(-1, -1)
    return FileStat(status.st_size, status.st_mtime_ns) if S_ISREG(status.st_mode) else FileStat(-1, -1)
