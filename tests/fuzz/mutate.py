"""Strategies: a tree of JSON, a file's bytes and a table of parquet, changed in a few places."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st


def nested(depth: int) -> list:
    tree: list = []
    for _ in range(depth):
        tree = [tree]
    return tree


NASTY = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 1e308, -0.5, 0.1, math.nan, math.inf),
    *(
        "",
        "x",
        "\0",
        "..",
        "../../etc/passwd",
        "/dev/zero",
        "/etc/passwd",
        "\ud800",
        "\u202e",
        "x" * 70_000,
        "v3.0",
        "v2.1",
    ),
    *(
        "{chunk_index}",
        "{chunk_index:999999999d}",
        "{0.__class__}",
        "{video_key!r}",
        "{",
        "}{",
        "{chunk_index:{file_index}}",
    ),
    *(
        "data/{file_index:03d}.parquet",
        "videos/{video_key}/{chunk_index:03d}.mp4",
        "float32",
        "video",
        "image",
        "int64",
    ),
    *("observation.state", "action", "observation.images.front", "timestamp", "index"),
    *([], {}, [[]], [0], [-1], [2**31], [1e9, 1e9], [1] * 2000, ["a", None], {"a": {}}, {"motors": ["x", 1]}, {"": 0}),
    nested(300),
]
LEAVES = st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a tree."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(p for key, value in inside for p in places(value, (*path, key)))]


@st.composite
def trees(draw: Any, tree: Any) -> Any:
    """`tree` with one to three values replaced, removed or put elsewhere too."""
    changed, known = copy.deepcopy(tree), places(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(known))
        if not path:
            if draw(st.integers(0, 20)) == 0:
                return draw(VALUES)
            continue
        parent = changed
        try:
            for key in path[:-1]:
                parent = parent[key]
            match draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"])):
                case "replace":
                    parent[path[-1]] = draw(VALUES)
                case "remove":
                    del parent[path[-1]]
                case "rename":
                    parent[draw(st.sampled_from([v for v in NASTY if isinstance(v, str)]))] = parent.pop(path[-1])
        except (LookupError, TypeError, AttributeError):
            continue  # a change before it has taken the place away
    return changed


def text_of(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@st.composite
def edits(draw: Any, content: bytes, first: int | None = None) -> bytes:
    """`content` with some of its bytes changed, cut off, repeated or overwritten by absurd lengths. `first`: so many
    bytes are changed more often: the headers."""
    data = bytearray(content)
    size = min(first or len(data), len(data))
    for _ in range(draw(st.integers(1, 6))):
        near = draw(st.booleans())
        at = draw(st.integers(0, max(0, (size if near else len(data)) - 1)))
        match draw(st.sampled_from(["set", "set", "word", "word", "cut", "repeat", "insert"])):
            case "set":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "word":
                word = draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0x00FFFFFF, 0xFFFF]))
                data[at : at + 4] = word.to_bytes(4, draw(st.sampled_from(["big", "little"])))
            case "cut":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


TYPES = [
    *(
        pa.int8(),
        pa.uint64(),
        pa.int64(),
        pa.float16(),
        pa.float32(),
        pa.float64(),
        pa.bool_(),
        pa.string(),
        pa.binary(),
    ),
    *(pa.large_string(), pa.null(), pa.timestamp("ns"), pa.date32(), pa.decimal128(20, 3), pa.duration("s")),
    *(pa.list_(pa.float32()), pa.list_(pa.float32(), 3), pa.list_(pa.list_(pa.int8())), pa.struct([("a", pa.int8())])),
    *(pa.dictionary(pa.int8(), pa.string()), pa.map_(pa.string(), pa.int8()), pa.large_list(pa.float64())),
]


@st.composite
def tables(draw: Any, table: pa.Table) -> pa.Table:
    """`table` with one or two columns of other types, values, names or lengths."""
    for _ in range(draw(st.integers(1, 2))):
        if not table.num_columns:
            break
        place = draw(st.integers(0, table.num_columns - 1))
        name, column = table.column_names[place], table.column(place)
        match draw(st.sampled_from(["type", "value", "value", "drop", "rename", "double", "rows", "numbers"])):
            case "type":
                table = table.set_column(place, name, of_type(draw(st.sampled_from(TYPES)), table.num_rows))
            case "value" if table.num_rows:
                values, row = column.to_pylist(), draw(st.integers(0, table.num_rows - 1))
                values[row] = draw(
                    st.sampled_from([None, 0, -1, 1, 10**6, 2**31, 2**53, math.nan, math.inf, -0.5, "x", []])
                )
                try:
                    table = table.set_column(place, name, pa.array(values, column.type))
                except (pa.ArrowException, OverflowError, TypeError, ValueError):
                    continue
            case "drop":
                table = table.remove_column(place)
            case "rename":
                names = [*table.column_names]
                names[place] = draw(st.sampled_from(["", "action", "x" * 1000, "data/chunk_index", "a.b", "\u202e"]))
                table = table.rename_columns(names)
            case "double":
                table = table.append_column(name, column)
            case "rows":
                order = (
                    draw(st.lists(st.integers(0, max(0, table.num_rows - 1)), max_size=40)) if table.num_rows else []
                )
                table = table.take(pa.array(order, pa.int64()))
            case "numbers":
                number = draw(st.sampled_from([0, -1, 1, 3, 2**31, 2**53, 2**62]))
                table = table.set_column(place, name, pa.array(np.full(table.num_rows, number, np.int64)))
    return table


def of_type(kind: pa.DataType, num: int) -> pa.Array:
    """An array of nulls, or of a value, of a type."""
    made = {pa.string(): "text", pa.binary(): b"bytes", pa.int8(): 1, pa.float32(): 0.5, pa.float64(): math.nan}
    return pa.array([made[kind]] * num, kind) if kind in made else pa.nulls(num, kind)
