"""Windows without pictures made into samples a batch at a time: the same bits as one by one, in a tenth of the time.

Nothing depends on this room but that time: where it has no answer, windows are read and transformed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.data.batch import Batch, join
from opentau_train.data.fields import Field, PictureField, PresenceField, TextField, fields_of
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.order.tape import Windows
from opentau_train.data.source import Cursor
from opentau_train.data.transforms.base import Record, SampleDraws, Transform
from opentau_train.types import BatchSpec


@runtime_checkable
class Gathering(Protocol):
    """What a source's `CursorFactory` may be too: one that gives many windows without pictures at once."""

    def gather(self, cursors: Sequence[Cursor], episodes: Sequence[int], frames: NDArray[np.int64]) -> Record | None:
        """The windows at `frames` [N] i64 of `episodes` [N] (positions in the table), which `cursors` [N] read: what a
        record of N begins with (`state`, `actions`, `action_is_pad`, `prompts`, and what is extra). None where they
        have to be read one by one: with pictures, or because one can't be read."""
        ...


def built_together(builder: SampleBuilder, windows: Windows) -> Batch | None:
    """What `builder` builds of the windows, which is the same as of one after another. None where they have to be built
    so: they have pictures, a source can't give many at once, or one of them can't be read."""
    mixture = builder.mixture
    if mixture.spec.cameras or not len(windows):
        return None
    parts, order, places = [], [], np.arange(len(windows))
    for d, of_dataset in _alike(windows.dataset):
        here = windows.select(of_dataset)
        numbers = mixture.datasets[d].source.episodes.episode_index[here.episode].astype(np.int64)
        keys = rng.fold(builder.keys[d], numbers, here.frame, here.pass_index)
        place = here.mode if here.mode is not None else np.array([builder.place(d, key) for key in keys.tolist()])
        group = mixture.datasets[d].group_of[here.episode] + place
        for g, same in _alike(group):
            part = _of_group(builder, here.select(same), g, int(place[same][0]), numbers[same], keys[same])
            if part is None:
                return None
            parts.append(part)
            order.append(places[of_dataset][same])
    return parts[0] if len(parts) == 1 else join(parts, np.argsort(np.concatenate(order)).tolist())


def _alike(values: NDArray[Any]) -> list[tuple[int, NDArray[np.int64] | slice]]:
    """(value, where it is) of the different ones of `values` [N]. One that is everywhere, as is usual, is a slice."""
    if (values == values[0]).all():
        return [(int(values[0]), slice(None))]
    return [(value, np.flatnonzero(values == value)) for value in np.unique(values).tolist()]


def _of_group(
    builder: SampleBuilder, windows: Windows, group: int, place: int, numbers: NDArray[np.int64], keys: rng.U64
) -> Batch | None:
    """The samples of windows of one dataset and group, `numbers` [N] being those of their episodes."""
    d, num = int(windows.dataset[0]), len(windows)
    cursors = [builder.cursor(lane, d) for lane in windows.slot.tolist()]
    if not _gathers(type(builder.factories[d])):
        return None
    read = cast(Gathering, builder.factories[d]).gather(cursors, windows.episode.tolist(), windows.frame)
    if read is None:
        return None
    record = builder.record(read | {"images": {}}, d, place, group)
    record |= {"key": keys, "episode_index": numbers, "frame_index": windows.frame, "pass_index": windows.pass_index}
    for name, transform in builder.mixture.pipelines[d].transforms.items():
        made = transform.many(record, num)
        record = _apart(transform, name, record, keys.tolist(), builder.training) if made is None else made
    fields, spec = fields_of(builder.mixture.spec), builder.mixture.spec
    return Batch(fields, {field.name: _stacked(field, record, num, spec) for field in fields})


@cache
def _gathers(kind: type) -> bool:
    return issubclass(kind, Gathering)  # which takes as long as ten windows


def _apart(transform: Transform, name: str, record: Record, keys: list[int], training: bool) -> Record:
    """The record after a transform that takes one window after another."""
    call = transform if training else transform.evaluate
    given = [_row(record, i) for i in range(len(keys))]
    rows = [call(dict(one), SampleDraws(key, name)) for one, key in zip(given, keys, strict=True)]
    changed = {n: None for one, row in zip(given, rows, strict=True) for n in row if row[n] is not one.get(n)}
    return record | {n: _column([row.get(n) for row in rows]) for n in changed}


def _row(record: Record, i: int) -> Record:
    """Window i of a record of several; without what a list has None of, which the window hasn't."""
    rows = {n: v[i] if isinstance(v, list | np.ndarray) else v for n, v in record.items()}
    return {n: v for n, v in rows.items() if v is not None}


def _column(values: list[Any]) -> Any:
    """As an array where they are arrays of one form."""
    forms = {(v.shape, v.dtype) if isinstance(v, np.ndarray) else None for v in values}
    return np.array(values) if len(forms) == 1 and None not in forms else values


def _stacked(field: Field, record: Record, num: int, spec: BatchSpec) -> Any:
    """The batch's value of a field, as `Field.stack` makes it of the record's `num` windows one by one."""
    value = record.get(field.name, field.fill)
    if isinstance(field, PictureField | PresenceField):
        return field.stack([], spec)  # of no camera
    if type(field) is TextField:
        return value if isinstance(value, list) else [value] * num
    if type(field) is not Field or isinstance(value, list):
        return field.stack([_row(record, i) for i in range(num)], spec)
    made: NDArray[Any]
    if isinstance(value, np.ndarray):
        made = np.array(value, field.dtype)
    else:
        made = np.full((num, *field.shape(spec)), value, field.dtype)
    return torch.from_numpy(made.view(np.int64) if field.dtype is np.uint64 else made)
