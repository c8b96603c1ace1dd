"""What policies take from a batch: text as tokens, which loss terms a sample supervises, and what of it is real."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opentau_train.data.batch import Batch
from opentau_train.data.fields import Field
from opentau_train.data.transforms.base import Record, SampleDraws, Transform
from opentau_train.types import BatchSpec

PAD_BYTE = 256
SUPERVISES = {
    "policy": ("mse", "ce"),
    "wam": ("mse", "ce", "vision_mse"),
    "forward_dynamics": ("vision_mse",),
    "inverse_dynamics": ("mse",),
}
"""{a sample's mode: the terms it supervises}: flow matching of actions, their tokens or bins, that of future frames."""


@dataclass(frozen=True)
class TokenizeBytes(Transform):
    """`prompt_tokens` [num_bytes] int64: the UTF-8 bytes of the prompt, cut or filled up with `PAD_BYTE`."""

    num_bytes: int

    reads: ClassVar = ("prompt",)
    writes: ClassVar = ("prompt_tokens",)

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        record["prompt_tokens"] = _bytes(record["prompt"], self.num_bytes)
        return record

    def many(self, record: Record, num: int) -> Record:
        return record | {"prompt_tokens": np.array([_bytes(text, self.num_bytes) for text in record["prompt"]])}

    def longest(self, record: Record) -> Record:
        text = "x" * self.num_bytes if record["prompt"] is None else record["prompt"]
        return {**record, "prompt_tokens": _bytes(text, self.num_bytes)}

    def fields(self, spec: BatchSpec) -> tuple[Field, ...]:
        return (Field("prompt_tokens", (self.num_bytes,), np.int64, PAD_BYTE),)


@dataclass(frozen=True)
class Supervise(Transform):
    """`supervised` [K] bool: which of the loss terms `terms` the sample's mode supervises, by `modes` {mode: terms}."""

    terms: tuple[str, ...]
    modes: dict[str, tuple[str, ...]]

    reads: ClassVar = ("mode",)
    writes: ClassVar = ("supervised",)

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        if "mode" in record:
            record["supervised"] = self._masks[record["mode"]]
        return record

    def many(self, record: Record, num: int) -> Record:
        return record | {"supervised": np.broadcast_to(self._masks[record["mode"]], (num, len(self.terms)))}

    @cached_property
    def _masks(self) -> dict[str, NDArray[np.bool_]]:
        return {mode: np.array([term in terms for term in self.terms]) for mode, terms in self.modes.items()}

    def fields(self, spec: BatchSpec) -> tuple[Field, ...]:
        return (Field("supervised", (len(self.terms),), np.bool_, False),)


def real_actions(batch: Batch) -> Tensor:
    """[B, T, A] bool: the entries of `actions` that a dataset has and that aren't a filler's."""
    steps = ~batch.action_is_pad & (batch.weight != 0)[:, None]
    return steps[:, :, None] & batch.action_dim_mask[:, None, :]


def real_state(batch: Batch) -> Tensor:
    """[B, S] f32: the state, 0 where a sample has none. Selected, not multiplied: padding may hold NaN."""
    return torch.where(batch.state_dim_mask, batch.state, 0.0)


@lru_cache(4096)
def _bytes(text: str, num: int) -> NDArray[np.int64]:
    tokens = np.full(num, PAD_BYTE, np.int64)
    data = text.encode()[:num]
    tokens[: len(data)] = np.frombuffer(data, np.uint8)
    return tokens
