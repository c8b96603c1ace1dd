"""Messages of openpi's protocol: msgpack maps, in which an array is a map too.

    {b"__ndarray__": True, b"data": its bytes in C order, b"dtype": "<f4", b"shape": [480, 640, 3]}
    {b"__npgeneric__": True, b"data": a number or a text, b"dtype": "<f4"}

as the package openpi-client writes and reads them. A message may come from anybody. So reading one makes arrays of
numbers, numbers, texts, and maps of these, and nothing else: no pickle, no objects, no extension types; an array's
bytes must be what its type and shape say, and whatever msgpack would make room for is bounded before it does.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.errors import UserError

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_NUMBERS = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
"""The types that arrays may have. Others never reach `numpy.dtype`, which would take `O` and structures too."""
_TEXT = re.compile(r"[<>|=]?U[0-9]{1,5}")
MAX_AXES = 8
MAX_ITEMS = 16_384
"""Of all lists and maps of a message together: each costs a hundred times its byte. Arrays are no lists."""
MAX_TEXT = 65_536
"""Bytes of a text."""


def library(name: str) -> Any:
    """The module `name` of the extra `serve`. Raises `UserError` where it isn't installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"servers and their clients need the package {name.partition('.')[0]}: {error}",
            remedy='pip install "opentau_train[serve]"',
        ) from error


def pack(message: Mapping[str, Any]) -> bytes:
    """A message of maps, lists, texts, numbers and arrays of numbers."""
    return library("msgpack").packb(message, default=_packed)


def _packed(value: Any) -> dict[bytes, Any]:
    """What msgpack can't write by itself: arrays, and NumPy's numbers."""
    if isinstance(value, np.ndarray | np.generic) and _NUMBERS.fullmatch(value.dtype.str):
        if isinstance(value, np.generic):
            return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"{type(value).__name__} is nothing that a message holds")


def unpack(message: bytes | str) -> dict[str, Any]:
    """The map that a message is: {name: array, number, text, list of these, or a map again}. Arrays are in the
    machine's byte order and may be written to. Raises `UserError` for anything else."""
    if isinstance(message, str):
        raise _refused("it is text, and observations are binary")
    hooks = _Hooks()
    try:
        made = library("msgpack").unpackb(
            message,
            object_hook=hooks.map,
            list_hook=hooks.list,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_TEXT,
            max_bin_len=len(message),
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # msgpack's own errors are ValueErrors
        raise _refused(f"it is no msgpack: {str(error)[:80] or type(error).__name__}") from error
    if not isinstance(made, dict) or not all(isinstance(name, str) for name in made):
        raise _refused("it is no map of names to values")
    return made


class _Hooks:
    """Called by msgpack for each list and map of one message, the inner ones first."""

    def __init__(self) -> None:
        self.num_items = 0

    def _count(self, num: int) -> None:
        self.num_items += 1 + num
        if self.num_items > MAX_ITEMS:
            raise _refused(f"its lists and maps have over {MAX_ITEMS:,} items; numbers come as arrays")

    def list(self, values: list[Any]) -> list[Any]:
        self._count(len(values))
        return values

    def map(self, values: dict[Any, Any]) -> Any:
        self._count(len(values))
        if _ARRAY in values:
            return _array(values)
        if _SCALAR in values:
            return _scalar(values)
        return values


def _array(values: Mapping[Any, Any]) -> NDArray | str:
    """The array of a map; the text, where it is an array of one text."""
    data, kind, shape = (values.get(key) for key in (b"data", b"dtype", b"shape"))
    axes = shape if isinstance(shape, list) else None
    if axes is None or len(axes) > MAX_AXES or not all(type(n) is int and 0 <= n < 2**31 for n in axes):
        raise _refused(f"an array's shape isn't up to {MAX_AXES} sizes")
    if not isinstance(data, bytes):
        raise _refused("an array's data aren't bytes")
    if isinstance(kind, str) and _TEXT.fullmatch(kind) and math.prod(axes) == 1:
        return _text(data, np.dtype(kind))
    if not isinstance(kind, str) or not _NUMBERS.fullmatch(kind):
        raise _refused(f"an array's type is {str(kind)[:20]!r}, not one of numbers (b1, i1 to i8, u1 to u8, f2 to f8)")
    dtype = np.dtype(kind)
    if math.prod(axes) * dtype.itemsize != len(data):
        raise _refused(f"an array of {kind} {axes} comes with {len(data):,} bytes")
    try:
        array = np.frombuffer(data, dtype).reshape(axes)
    except ValueError as error:  # no bytes, and sizes beside the 0 that no array has
        raise _refused(f"an array has the shape {axes}") from error
    return array.astype(dtype.newbyteorder("="))


def _text(data: bytes, dtype: np.dtype) -> str:
    if dtype.itemsize != len(data) or len(data) > 4 * MAX_TEXT or not data:
        raise _refused(f"a text of {dtype.str} comes with {len(data):,} bytes")
    try:
        # Not by NumPy, which makes texts of numbers that are no characters, and fails where they are used.
        return data.decode("utf-32-be" if dtype.byteorder == ">" else "utf-32-le").rstrip("\0")
    except UnicodeDecodeError as error:
        raise _refused("a text has no characters") from error


def _scalar(values: Mapping[Any, Any]) -> Any:
    """The number, or text, of a map."""
    data, kind = values.get(b"data"), values.get(b"dtype")
    if isinstance(data, str) and isinstance(kind, str) and _TEXT.fullmatch(kind):
        return data
    if not isinstance(data, bool | int | float) or not isinstance(kind, str) or not _NUMBERS.fullmatch(kind):
        raise _refused("a NumPy number is none")
    try:
        return np.dtype(kind).type(data)
    except (ValueError, OverflowError) as error:
        raise _refused(f"a NumPy number isn't of its type {kind}") from error


def _refused(why: str) -> UserError:
    return UserError(
        f"the message can't be read: {why}",
        where="the message",
        remedy="send what openpi-client sends: a msgpack map of names to texts, numbers and arrays of numbers",
    )
