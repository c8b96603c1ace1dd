"""The tables of meta/, read column by column. Whatever type a file gives its numbers, they come out as one type; what
is no number is named with its file, column and row."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.data.decode.parquet import UNREADABLE
from opentau_train.data.lerobot.info import RESTORE, unreadable
from opentau_train.errors import UserError

log = logging.getLogger(__name__)

LINES_BYTES = 512 * 2**20
MOST_ROWS = 10**7
"""Of a file of metadata."""
LARGEST = 2**53
"""Of whole numbers: those below are exact in every type that a file may give them."""
_VALUES = (*UNREADABLE, ValueError, OverflowError)
"""What pyarrow raises for a damaged file or for values that Python has no type for."""


@dataclass(frozen=True)
class Table:
    """Rows of metadata: `numbers` {column: [N] i64 or f64}, `values` {column: N Python objects, None where a row or its
    file has none}, `told` {column: [N] f64, NaN there and for what is no number}, `names` of all columns. `integers`
    are the numbers that a file has as integers."""

    numbers: Mapping[str, NDArray[Any]]
    values: Mapping[str, list[Any]]
    names: tuple[str, ...]
    told: Mapping[str, NDArray[np.float64]]
    integers: frozenset[str] = frozenset()


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in `folder` and in its chunk folders, sorted. Links are followed; what is no file of LeRobot's
    is passed over with a line in the log. Raises `UserError` where there are none."""
    try:
        top = sorted(folder.iterdir())
        chunks = [path for path in top if path.is_dir() and not path.name.startswith(".")]
        entries = [path for path in top if path not in chunks] + [
            p for chunk in chunks for p in sorted(chunk.iterdir())
        ]
        shown = [path for path in entries if not path.name.startswith(".")]
    except FileNotFoundError:
        entries = shown = []
    except OSError as error:
        raise unreadable(folder, error) from error
    plain = [path for path in shown if path.suffix == ".parquet"]
    files = [path for path in plain if re.fullmatch(r"file-\d+", path.stem)] or plain
    # A link that leads nowhere is for the reading to name: its episodes would else be gone.
    files += [path for path in shown if path not in files and path.is_symlink() and not path.exists()]
    if not files:
        raise UserError("no episode metadata: no parquet file", where=str(folder), remedy=RESTORE)
    over = [str(path.relative_to(folder)) for path in entries if path not in files]
    if over:
        log.warning("%s: passed over, being no file of the dataset: %s", folder, ", ".join(over))
    return files


def read_parquet(
    paths: Sequence[Path],
    numbers: Mapping[str, type],
    values: Sequence[str] = (),
    told: Sequence[str] = (),
    remedy: str = RESTORE,
) -> Table:
    """The rows of all files: the columns `numbers` {name: int or float}, which must be there, and of `values` and
    `told` those that a file has. Raises `UserError`, whose remedy is `remedy` where a number is none."""
    names: dict[str, None] = {}
    integers: set[str] = set()
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in numbers}
    objects: dict[str, list[Any]] = {name: [] for name in values}
    floats: dict[str, list[NDArray[np.float64]]] = {name: [] for name in told}
    for path in paths:
        table, there = _read_file(path, [*numbers], [*values, *told])
        names |= dict.fromkeys(there)
        integers |= {name for name in numbers if pa.types.is_integer(table.schema.field(name).type)}
        for name, kind in numbers.items():
            parts[name].append(_numbers(table, Cells(name, kind, path, remedy)))
        for name, column in objects.items():
            column += _objects(table, name, path)
        for name in told:
            floats[name].append(_told(table, name, path))
    objects = {name: column for name, column in objects.items() if name in names}
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    given = {name: np.concatenate(arrays) for name, arrays in floats.items() if name in names}
    return Table(joined, objects, tuple(names), given, frozenset(integers))


def text_columns(path: Path) -> list[str]:
    """The names of a file's columns of texts. Raises `UserError`."""
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    out = []
    for field in _schema(path):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        out += [field.name] * any(is_kind(kind) for is_kind in kinds)
    return out


def _schema(path: Path) -> pa.Schema:
    try:
        strangers.check_plain(path)
        return pq.read_schema(path)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def read_jsonl(path: Path, numbers: Mapping[str, type], values: Sequence[str] = (), told: Sequence[str] = ()) -> Table:
    """The same of a file with one JSON object a line. Raises `UserError`."""
    rows, lines, number = [], [], 0
    try:
        # Only "\n" ends a line: a text may hold others of the characters at which `splitlines` does.
        for number, line in enumerate(strangers.read_bytes(path, LINES_BYTES).decode("utf-8-sig").split("\n"), start=1):
            if line.strip():
                rows.append(strangers.parse(line))
                lines.append(number)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, f"line {number}: " if number else "") from error
    for number, row in zip(lines, rows, strict=True):
        missing = [name for name in numbers if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(f"line {number} has no '{missing[0]}'", where=str(path), remedy=RESTORE)
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(
        {n: _from_json([row[n] for row in rows], Cells(n, kind, path, lines=lines)) for n, kind in numbers.items()},
        {name: [row.get(name) for row in rows] for name in values if name in names},
        names,
        {name: _floats([row.get(name) for row in rows]) for name in told if name in names},
    )


def _read_file(path: Path, needed: list[str], optional: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """The columns `needed` and, where the file has them, `optional`; the names of all."""
    try:
        strangers.check_plain(path)
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > MOST_ROWS:
                raise strangers.Refused(f"it has {file.metadata.num_rows:,} rows, more than {MOST_ROWS:,}")
            there = file.schema_arrow.names
            missing = next((name for name in needed if there.count(name) != 1), None)
            if missing is not None:
                what = f"no column '{missing}'" if missing not in there else f"more than one column '{missing}'"
                raise UserError(what, where=str(path), remedy=RESTORE)
            wanted = [*dict.fromkeys([*needed, *(name for name in optional if there.count(name) == 1)])]
            table = file.read(columns=wanted, use_threads=False).select(wanted)
            table.validate(full=True)
            return table, there
    except UNREADABLE as error:
        raise unreadable(path, error) from error


@dataclass(frozen=True)
class Cells:
    """A column of a file whose values are to be numbers of the type `kind`. `lines` are its rows' lines in the file."""

    name: str
    kind: type
    path: Path
    remedy: str = RESTORE
    lines: Sequence[int] | None = None

    def wrong(self, row: int, value: str) -> UserError:
        """The error of the value in `row`."""
        place = f"row {row}" if self.lines is None else f"line {self.lines[row]}"
        needed = "a number" if self.kind is float else "a whole number, 0 or more"
        what = f"column '{self.name}', {place}: {value} is not {needed}"
        return UserError(what, where=str(self.path), remedy=self.remedy)

    def checked(self, values: NDArray[Any]) -> NDArray[Any]:
        """The numbers `values` as int64 or float64. Raises `UserError` for the first that isn't of the kind."""
        if self.kind is float:
            good = np.isfinite(values)
        else:
            good = (values >= 0) & (values <= LARGEST)
            good &= values == np.floor(values)
        if not good.all():
            row = int(np.argmin(good))
            raise self.wrong(row, str(values[row]))
        return values.astype(np.float64 if self.kind is float else np.int64)


def _numbers(table: pa.Table, cells: Cells) -> NDArray[Any]:
    """The column's [N] numbers as int64 or float64. Raises `UserError` naming the row of the file that has none."""
    array = table.column(cells.name).combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count:
        raise cells.wrong(int(np.flatnonzero(np.asarray(array.is_null()))[0]), "null")
    if pa.types.is_decimal(array.type) or pa.types.is_floating(array.type):
        array = array.cast(pa.float64())
    if not len(array):
        return np.zeros(0, np.float64 if cells.kind is float else np.int64)
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise cells.wrong(0, f"a value of type {array.type}")
    return cells.checked(array.to_numpy(zero_copy_only=False))


def _from_json(values: list[Any], cells: Cells) -> NDArray[Any]:
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > LARGEST:
            raise cells.wrong(row, json.dumps(value)[:80])
    return cells.checked(np.array(values, np.float64))


def _objects(table: pa.Table, name: str, path: Path) -> list[Any]:
    if name not in table.column_names:
        return [None] * table.num_rows
    try:
        return table.column(name).to_pylist()
    except _VALUES as error:
        raise UserError(f"column '{name}' can't be read: {error}", where=str(path), remedy=RESTORE) from error


def _told(table: pa.Table, name: str, path: Path) -> NDArray[np.float64]:
    """[N] the numbers of a column, NaN where a row has none."""
    if name in table.column_names:
        kind = table.schema.field(name).type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return table.column(name).to_numpy().astype(np.float64)  # nulls are NaN
    return _floats(_objects(table, name, path))


def _floats(values: list[Any]) -> NDArray[np.float64]:
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], np.float64)
