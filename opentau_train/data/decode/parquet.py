"""Rows of parquet files: a run of rows, of the columns that are needed, and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.data.decode.footers import UNREADABLE, check_chunks
from opentau_train.data.decode.open_files import OpenFiles
from opentau_train.data.decode.opening import Opener, open_here
from opentau_train.errors import check_machine_read

OPEN_FILES = 32
MOST_ROWS = 2**26
"""Of a file: where an episode's are isn't told, the numbers of all of them are read."""
GROUP_BYTES = 2**30
"""What the columns of a row group may take."""
CACHED_BYTES = 64 * 2**20


class RowError(Exception):
    """Rows can't be had; the text names the file and the cause."""


class _RowFile(NamedTuple):
    """An open file, after which of its rows each row group ends, the columns that are read, without rows, their places
    in a group, and whether the footer is known to be sound there: else each group is looked at before it is read."""

    handle: pq.ParquetFile
    ends: NDArray[np.int64]
    empty: pa.Table
    places: dict[str, list[int]]
    sound: bool

    def places_of(self, columns: Sequence[str]) -> list[int]:
        return sorted({place for column in columns for place in self.places[column]})

    def close(self) -> None:
        self.handle.close()


class RowReader:
    """Reads rows of `columns` from parquet files, which `opener` opens, in row order. The last files stay open, and
    their last row groups in memory: a group may hold many episodes.

    It works in forked workers: of threads only pyarrow's own read, which begin anew in a fork. `apart`: others read on
    threads beside it. Its methods raise `RowError` where a file can't be read.
    """

    def __init__(self, columns: Sequence[str], opener: Opener = open_here, *, apart: bool = False):
        self._opener = opener
        self._columns = [*dict.fromkeys(columns)]
        self._files = OpenFiles[Path, _RowFile](self._opened, OPEN_FILES, apart=apart)
        self._groups: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._cached_bytes = 0

    def num_rows(self, path: Path) -> int:
        """Rows of the file."""
        with self._reading(path) as file:
            return int(file.ends[-1]) if len(file.ends) else 0

    def slice(self, path: Path, start: int, length: int) -> pa.Table:
        """The reader's columns of `length` rows from row `start` on, fewer where the file ends, each in one contiguous
        chunk that shares no memory with the file's other rows."""
        with self._reading(path) as file:
            length = max(min(length, (int(file.ends[-1]) if len(file.ends) else 0) - start), 0)
            parts = [file.empty, *(self._parts(path, file, start, length) if length else ())]
            # A copy: a lane keeps its episode's rows for long, and a slice would keep the whole row group alive.
            rows = pa.concat_tables(parts).take(pa.array(np.arange(length))).combine_chunks()
            rows.validate(full=True)
            return rows

    def take(self, path: Path, rows: NDArray[np.int64]) -> pa.Table:
        """The reader's columns of the rows numbered `rows` [N], in that order."""
        order = np.argsort(rows, kind="stable")
        runs = np.split(rows[order], np.flatnonzero(np.diff(rows[order]) != 1) + 1)
        risen = pa.concat_tables([self.slice(path, int(run[0]), len(run)) for run in runs if len(run)])
        return risen.take(pa.array(np.argsort(order))).combine_chunks()

    def whole(self, path: Path, columns: Sequence[str]) -> pa.Table:
        """`columns` of all of the file's rows."""
        with self._reading(path) as file:
            return self._read(file, range(file.handle.num_row_groups), columns)

    def close(self) -> None:
        self._files.shrink(0)
        self._groups.clear()
        self._cached_bytes = 0

    @contextmanager
    def _reading(self, path: Path) -> Iterator[_RowFile]:
        """The opened file; one that turns out damaged is forgotten. Raises `RowError`, and `Fault` where the machine is
        to blame."""
        try:
            yield self._files.get(path)
        except UNREADABLE as error:
            self._forget(path)
            check_machine_read(error, path)
            raise RowError(f"{path}: {' '.join(str(error).split())}") from error

    def _opened(self, path: Path) -> _RowFile:
        # Not mapped: a page that the disk or the server refuses would kill the process by SIGBUS.
        handle = self._opener(path, _parquet_file)
        names = handle.schema_arrow.names
        wrong = next((c for c in self._columns if names.count(c) != 1), None)
        if wrong is not None:
            handle.close()
            raise RowError(f"{path} has {'more than one' if wrong in names else 'no'} column '{wrong}'")
        metadata = handle.metadata
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) > MOST_ROWS:
            handle.close()
            raise RowError(f"{path} has {sum(rows):,} rows, or fewer than none in a group: {MOST_ROWS:,} are the most")
        ends = np.cumsum(rows, dtype=np.int64)
        roots = [metadata.schema.column(i).path.split(".")[0] for i in range(metadata.num_columns)]
        places = {c: [i for i, root in enumerate(roots) if root == c.split(".")[0]] for c in self._columns}
        file = _RowFile(handle, ends, handle.schema_arrow.empty_table().select(self._columns), places, True)
        try:
            check_chunks(metadata, range(len(rows)), file.places_of(self._columns))
            return file
        except UNREADABLE:
            return file._replace(sound=False)  # of one group, perhaps: the others' episodes are read

    def _parts(self, path: Path, file: _RowFile, start: int, length: int) -> Iterator[pa.Table]:
        """The `length` > 0 rows from row `start` on, in order. Row groups that are asked for whole are read in one
        call: each call has its price, and some files have a group an episode."""
        ends, stop = file.ends, start + length
        group, last = (int(g) for g in np.searchsorted(ends, [start, stop - 1], side="right"))
        begin = int(ends[group - 1]) if group else 0
        whole = range(group + int(begin < start), last + int(ends[last] <= stop))
        while group <= last:
            if len(whole) > 1 and group == whole.start:
                yield self._read(file, whole, self._columns)
                group = whole.stop
            else:
                table = self._group(path, file, group)
                low = max(start - begin, 0)
                yield table.slice(low, min(stop - begin, table.num_rows) - low)
                group += 1
            begin = int(ends[group - 1])

    def _group(self, path: Path, file: _RowFile, group: int) -> pa.Table:
        table = self._groups.get((path, group))
        if table is not None:
            self._groups.move_to_end((path, group))
            return table
        self._groups[path, group] = table = self._read(file, range(group, group + 1), self._columns)
        self._cached_bytes += table.nbytes
        while self._cached_bytes > CACHED_BYTES and len(self._groups) > 1:
            self._cached_bytes -= self._groups.popitem(last=False)[1].nbytes
        return table

    def _read(self, file: _RowFile, groups: range, columns: Sequence[str]) -> pa.Table:
        """Some of the reader's columns of row groups."""
        places, metadata = file.places_of(columns), file.handle.metadata
        for group in groups:
            if not file.sound:
                check_chunks(metadata, [group], places)
            _check_size(metadata.row_group(group), places)
        # pyarrow takes "action" for a prefix of "action.x" too: select again.
        return file.handle.read_row_groups(groups, columns=list(columns), use_threads=False).select(columns)

    def _forget(self, path: Path) -> None:
        self._files.drop(path)
        for key in [k for k in self._groups if k[0] == path]:
            self._cached_bytes -= self._groups.pop(key).nbytes


def _check_size(group: Any, places: list[int]) -> None:
    """Raises `strangers.Refused` where the columns at `places` of a row group would take more memory than a file has
    cause to: encoded, a number that is repeated takes none."""
    size = 0
    for place in places:
        column = group.column(place)
        size += max(column.total_uncompressed_size, 8 * column.num_values)
    if size > GROUP_BYTES or group.num_rows > GROUP_BYTES // 8:
        raise strangers.Refused(f"a row group of {group.num_rows:,} rows and {size:,} bytes, more than are read")


def _parquet_file(path: Path) -> pq.ParquetFile:
    strangers.check_plain(path)
    return pq.ParquetFile(path, page_checksum_verification=True)


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array without an extension type around its storage."""
    array = column.combine_chunks()
    return array.storage if isinstance(array.type, pa.BaseExtensionType) else array


def numbers(rows: pa.Table, name: str, dim: int, dtype: type = np.float32) -> NDArray[Any]:
    """The values [L, dim] of a column of scalars or (nested) lists. Raises `RowError` for nulls and other widths."""
    array, ends = one_array(rows.column(name)), np.arange(rows.num_rows + 1)
    while True:
        if array.null_count:
            row = int(np.flatnonzero(np.asarray(array.is_null()))[0])
            raise RowError(f"column '{name}' has a null (value {row} of the episode)")
        if not is_list(array.type):
            break
        ends = _ends(array)[ends]
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    if (np.diff(ends) != dim).any():
        raise RowError(f"column '{name}' doesn't have the {dim} values a row that meta/info.json promises")
    if values.dtype.kind not in "fiub":
        raise RowError(f"column '{name}' holds {array.type}, not numbers")
    if values.dtype.kind == "f" and dtype is np.int64 and not np.isfinite(values).all():
        raise RowError(f"column '{name}' has a value that is no number")
    return values.reshape(rows.num_rows, dim).astype(dtype)


def texts(rows: pa.Table, name: str) -> tuple[NDArray[np.int32], list[str]]:
    """(codes [L] int32, the distinct texts): row i has the text number `codes[i]`, -1 stands for null. Raises
    `RowError` where it isn't text."""
    array = one_array(rows.column(name))
    if is_list(array.type):
        if array.null_count or len(array.flatten()) != len(array):
            raise RowError(f"column '{name}' doesn't have one text a row")
        array = array.flatten()
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        raise RowError(f"column '{name}' holds {array.type}, not text")
    coded = array.dictionary_encode()
    return np.asarray(coded.indices.fill_null(-1)).astype(np.int32), coded.dictionary.to_pylist()


def is_list(kind: pa.DataType) -> bool:
    """Whether the values of the type are lists, of any kind."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _ends(array: pa.Array) -> NDArray[Any]:
    """[L + 1] where each list begins among the values of `array.flatten()`, and where the last one ends."""
    if pa.types.is_fixed_size_list(array.type):
        return np.arange(len(array) + 1) * array.type.list_size
    offsets = np.asarray(array.offsets)
    return offsets - offsets[0]
