"""Rows of parquet files: the rows of one episode, of the columns that are needed, and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opentau_train.data.decode.open_files import OpenFiles
from opentau_train.machine import check_machine_read

EPISODE_COLUMN = "episode_index"
OPEN_FILES = 32
CACHED_BYTES = 64 * 2**20
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises for a damaged file; the last where a column's name or its own message is garbled."""


class RowError(Exception):
    """Rows can't be had; the text names the file and the cause."""


class _RowFile(NamedTuple):
    """An open file, and after which of its rows each row group ends."""

    handle: pq.ParquetFile
    ends: NDArray[np.int64]

    def close(self) -> None:
        self.handle.close()


class RowReader:
    """Reads episodes' rows of `columns` from files, whose paths `path` gives by their numbers. The last files stay
    open, and their last row groups in memory: a group may hold many episodes.

    Single-threaded, so that it works in forked workers.
    """

    def __init__(self, path: Callable[[int], Path], columns: Sequence[str]):
        self._path = path
        self._columns = [*dict.fromkeys([EPISODE_COLUMN, *columns])]
        self._files = OpenFiles(self._opened, OPEN_FILES)
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._cached_bytes = 0

    def read(self, file: int, start: int, length: int, episode_index: int) -> pa.Table:
        """`length` rows from row `start` of the file numbered `file`, and of them the reader's columns, each in one
        contiguous chunk that shares no memory with the file's other rows.

        Raises `RowError` where the file can't be read or the rows aren't those of `episode_index`, and `Fault` where
        the machine is to blame.
        """
        path = self._path(file)
        try:
            rows = self._slice(file, path, start, length)
            rows.validate(full=True)
        except UNREADABLE as error:
            self._forget(file)
            check_machine_read(error, path)
            raise RowError(f"{path}: {error}") from error
        episodes = rows.column(EPISODE_COLUMN)
        if episodes.null_count or not (np.asarray(episodes) == episode_index).all():
            raise RowError(f"{path}: rows {start} to {start + length - 1} are not all of episode {episode_index}")
        return rows

    def close(self) -> None:
        self._files.shrink(0)
        self._groups.clear()
        self._cached_bytes = 0

    def _slice(self, file: int, path: Path, start: int, length: int) -> pa.Table:
        handle, ends = self._files.get(file)
        if start + length > (ends[-1] if len(ends) else 0):
            raise RowError(
                f"{path} has {handle.metadata.num_rows} rows, the metadata place an episode at "
                f"rows {start} to {start + length - 1}"
            )
        first, last = np.searchsorted(ends, [start, start + length - 1], side="right")
        parts = []
        for group in range(first, last + 1):
            begin = ends[group - 1] if group else 0
            table = self._group(file, handle, group)
            low, high = max(start - begin, 0), min(start + length - begin, table.num_rows)
            parts.append(table.slice(low, high - low))
        # A copy: a lane keeps its episode's rows for long, and a slice would keep the whole row group alive.
        return pa.concat_tables(parts).take(pa.array(np.arange(length))).combine_chunks()

    def _opened(self, file: int) -> _RowFile:
        path = self._path(file)
        # Not mapped: a page that the disk or the server refuses would kill the process by SIGBUS.
        handle = pq.ParquetFile(path, page_checksum_verification=True)
        missing = [c for c in self._columns if c not in handle.schema_arrow.names]
        if missing:
            handle.close()
            raise RowError(f"{path} has no column '{missing[0]}'")
        metadata = handle.metadata
        ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], dtype=np.int64)
        return _RowFile(handle, ends)

    def _group(self, file: int, handle: pq.ParquetFile, group: int) -> pa.Table:
        table = self._groups.get((file, group))
        if table is not None:
            self._groups.move_to_end((file, group))
            return table
        # pyarrow takes "action" for a prefix of "action.x" too: select again.
        table = handle.read_row_group(group, columns=self._columns, use_threads=False).select(self._columns)
        self._groups[file, group] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > CACHED_BYTES and len(self._groups) > 1:
            self._cached_bytes -= self._groups.popitem(last=False)[1].nbytes
        return table

    def _forget(self, file: int) -> None:
        self._files.drop(file)
        for key in [k for k in self._groups if k[0] == file]:
            self._cached_bytes -= self._groups.pop(key).nbytes


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array without an extension type around its storage."""
    array = column.combine_chunks()
    return array.storage if isinstance(array.type, pa.BaseExtensionType) else array


def numbers(rows: pa.Table, name: str, dim: int, dtype: type = np.float32) -> NDArray[Any]:
    """The values [L, dim] of a column of scalars or (nested) lists. Raises `RowError` for nulls and other widths."""
    array = one_array(rows.column(name))
    while True:
        if array.null_count:
            row = int(np.flatnonzero(np.asarray(array.is_null()))[0])
            raise RowError(f"column '{name}' has a null (value {row} of the episode)")
        if not _is_list(array.type):
            break
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    if values.size != rows.num_rows * dim or _ragged(rows, name, dim):
        raise RowError(f"column '{name}' doesn't have the {dim} values a row that meta/info.json promises")
    if values.dtype.kind not in "fiub":
        raise RowError(f"column '{name}' holds {array.type}, not numbers")
    return values.reshape(rows.num_rows, dim).astype(dtype)


def texts(rows: pa.Table, name: str) -> tuple[NDArray[np.int32], list[str]]:
    """(codes [L] int32, the distinct texts): row i has the text number `codes[i]`, -1 stands for null. Raises
    `RowError` where it isn't text."""
    array = one_array(rows.column(name))
    if _is_list(array.type):
        if array.null_count or len(array.flatten()) != len(array):
            raise RowError(f"column '{name}' doesn't have one text a row")
        array = array.flatten()
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        raise RowError(f"column '{name}' holds {array.type}, not text")
    coded = array.dictionary_encode()
    return np.asarray(coded.indices.fill_null(-1)).astype(np.int32), coded.dictionary.to_pylist()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _ragged(rows: pa.Table, name: str, dim: int) -> bool:
    """Whether a list column's rows differ in length although their total fits."""
    array = one_array(rows.column(name))
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)) or _is_list(array.type.value_type):
        return False
    return bool((np.diff(np.asarray(array.offsets)) != dim).any())
