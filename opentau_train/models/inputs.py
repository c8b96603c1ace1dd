"""Transforms that policies add to the data's: text as tokens, and which loss terms a sample supervises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from opentau_train.batch import Field
from opentau_train.data.transforms.base import Record, SampleDraws, Transform
from opentau_train.types import BatchSpec

PAD_BYTE = 256


@dataclass(frozen=True)
class TokenizeBytes(Transform):
    """`prompt_tokens` [num_bytes] int64: the UTF-8 bytes of the prompt, cut or filled up with `PAD_BYTE`."""

    num_bytes: int

    reads: ClassVar = ("prompt",)
    writes: ClassVar = ("prompt_tokens",)

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        tokens = np.full(self.num_bytes, PAD_BYTE, np.int64)
        data = record["prompt"].encode()[: self.num_bytes]
        tokens[: len(data)] = np.frombuffer(data, np.uint8)
        return record | {"prompt_tokens": tokens}

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
        supervises = self.modes[record["mode"]] if "mode" in record else ()
        return record | {"supervised": np.array([term in supervises for term in self.terms])}

    def fields(self, spec: BatchSpec) -> tuple[Field, ...]:
        return (Field("supervised", (len(self.terms),), np.bool_, False),)
