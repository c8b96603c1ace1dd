"""Samples as a batch: stacked, joined, blanked, filled up and cut by going through the table of `data/fields`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opentau_train.data.fields import Field, Sample, TokenCounts, fields_of
from opentau_train.errors import did_you_mean
from opentau_train.types import BatchSpec


class Batch:
    """Samples stacked: `batch.NAME` is the value of the field NAME, see `FIELDS` and the classes of fields for shapes.

    Frozen: a method that changes something returns another batch.
    """

    def __init__(self, fields: tuple[Field, ...], values: dict[str, Any]):
        self.fields, self.values = fields, values

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(f"the batch has no field '{name}'{did_you_mean(name, values)}")

    def __len__(self) -> int:
        return len(self.values["weight"])

    def replace(self, **values: Any) -> Batch:
        """The same batch with other values of some of its fields."""
        for name in values:
            getattr(self, name)
        return Batch(self.fields, {**self.values, **values})

    def counted(self, num_tokens: NDArray[np.int64]) -> Batch:
        """The same batch with `num_tokens` [B, K] (`Policy.num_tokens`), which stay on the host: it is packed then."""
        return Batch((*self.fields, TokenCounts("num_tokens")), {**self.values, "num_tokens": num_tokens})

    def rows(self, index: slice | Tensor) -> Batch:
        """The samples at `index` (a slice, or numbers [N] int64 on the host), in its order."""
        there = index if isinstance(index, slice) else to_device(index, self.weight.device)
        return Batch(self.fields, {f.name: f.rows(self.values[f.name], (there, index)[f.on_host]) for f in self.fields})

    def each(self, call: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `call` applied to every tensor."""
        return Batch(self.fields, {f.name: f.each(self.values[f.name], call) for f in self.fields})

    def visit(self, call: Callable[[Tensor], object]) -> None:
        """Call `call(tensor)` for every tensor, for its side effect."""
        self.each(lambda tensor: (call(tensor), tensor)[1])

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; where they are pinned, the copies run beside the program."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive micro-batches of at most `size` samples."""
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))

    def filled_up(self, size: int) -> Batch:
        """The batch with copies of its first row, of weight 0, up to `size` rows."""
        num = len(self)
        if num == size:
            return self
        row = torch.arange(size)
        full = self.rows(torch.where(row < num, row, 0))
        return full.replace(weight=torch.where(row < num, full.weight, 0.0))


def to_device(values: Tensor | NDArray, device: torch.device) -> Tensor:
    """On `device`, copied from pinned memory where that is CUDA: the host doesn't wait for what the device does."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def stack(samples: Sequence[Sample], spec: BatchSpec) -> Batch:
    """Samples as a batch."""
    fields = fields_of(spec)
    return Batch(fields, {field.name: field.stack(samples, spec) for field in fields})


def join(parts: Sequence[Batch], order: Sequence[int]) -> Batch:
    """One batch of several, rows rearranged: row i of the result is row `order[i]` of the parts laid end to end."""
    if len(parts) == 1 and list(order) == list(range(len(order))):
        return parts[0]
    fields = parts[0].fields
    return Batch(fields, {f.name: f.join([part.values[f.name] for part in parts], order) for f in fields})


def blank_batch(spec: BatchSpec) -> Batch:
    """A batch of one blank sample of weight 0, for a rank that has no sample but must take part in a forward."""
    return stack([{}], spec)
