"""Actions as tokens, for the cross-entropy: bins, or FAST (Pertsch et al. 2025) by files that the user gives."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.fields import Field
from opentau_train.data.transforms.base import Record, SampleDraws, Transform
from opentau_train.errors import UserError
from opentau_train.models import prompts
from opentau_train.models.prompts import NO_TOKEN
from opentau_train.types import BatchSpec

PROCESSOR = "processor_config.json"
_LAST_CHARACTER = 0xD7FF  # the next ones are halves of characters


@dataclass(frozen=True)
class TokenizeActions(Transform, ABC):
    """`action_tokens` [`num_tokens`] int64: the chunk's real steps and dimensions, filled up with `NO_TOKEN`. What a
    robot observes has no actions, and no tokens. Raises `UserError` for a chunk of more tokens."""

    num_tokens: int

    reads: ClassVar = ("actions", "action_is_pad", "action_dim_mask")
    writes: ClassVar = ("action_tokens",)

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        if "actions" in record:
            real = record["actions"][~record["action_is_pad"]][:, record["action_dim_mask"]]
            ids = self.encode(real, len(record["actions"]))
            if len(ids) > self.num_tokens:
                raise UserError(
                    f"a chunk has {len(ids)} action tokens, the policy takes {self.num_tokens}",
                    where="model.max_action_tokens",
                    remedy=f"set model.max_action_tokens={2 * len(ids)}: other chunks may have more",
                )
            tokens = np.full(self.num_tokens, NO_TOKEN, np.int64)
            tokens[: len(ids)] = ids
            record["action_tokens"] = tokens
        return record

    def longest(self, record: Record) -> Record:
        tokens = np.full(self.num_tokens, NO_TOKEN, np.int64)
        tokens[: self.most(record)] = 0
        return {**record, "action_tokens": tokens}

    def most(self, record: Record) -> int:
        """The most tokens that the real part of a chunk may have."""
        return self.num_tokens

    @abstractmethod
    def encode(self, actions: NDArray[np.float32], num_steps: int) -> NDArray[np.int64]:
        """The tokens of the real part [T', A'] of a chunk of `num_steps`, normalised."""

    def fields(self, spec: BatchSpec) -> tuple[Field, ...]:
        return (Field("action_tokens", (self.num_tokens,), np.int64, NO_TOKEN),)


@dataclass(frozen=True)
class BinActions(TokenizeActions):
    """One token an element, step by step: its bin of `num_bins` between `low` and `high`, what lies outside falling in
    the outermost."""

    num_bins: int
    low: float
    high: float

    def most(self, record: Record) -> int:
        return int((~record["action_is_pad"]).sum() * record["action_dim_mask"].sum())

    def encode(self, actions: NDArray[np.float32], num_steps: int) -> NDArray[np.int64]:
        place = (actions.reshape(-1) - self.low) / (self.high - self.low)
        return np.floor(place * self.num_bins).clip(0, self.num_bins - 1).astype(np.int64)


@dataclass(frozen=True)
class FastActions(TokenizeActions):
    """FAST: the cosine transform of each dimension over the chunk, rounded, frequency by frequency, and compressed by
    byte-pair encoding. `tokenizer` is its folder: tokenizer.json and processor_config.json. The steps past an episode's
    end repeat its last one."""

    tokenizer: str

    def encode(self, actions: NDArray[np.float32], num_steps: int) -> NDArray[np.int64]:
        if not actions.size:
            return np.zeros(0, np.int64)
        whole = np.concatenate([actions, np.repeat(actions[-1:], num_steps - len(actions), axis=0)])
        return np.array(fast(self.tokenizer).encode(whole), np.int64)


def make_bins(num_tokens: int, bins: tuple[int, float, float]) -> tuple[TokenizeActions, int]:
    """Bins (how many, lowest, highest value), and how many tokens they are. Raises `UserError` for an empty range."""
    if not bins[1] < bins[2]:
        raise UserError(f"model.bin_range={list(bins[1:])} must rise", remedy="set model.bin_range=[-3.0,3.0]")
    return BinActions(num_tokens, *bins), bins[0]


def make_fast(num_tokens: int, folder: str | None) -> tuple[TokenizeActions, int]:
    """FAST by the files in `folder`, and how many tokens it has. Raises `UserError` where there are none."""
    if folder is None:
        raise UserError(
            "model.action_tokens=fast without FAST's files",
            where="model.action_tokenizer_path",
            remedy="set it to their folder (tokenizer.json and processor_config.json), or model.action_tokens=binned",
        )
    return FastActions(num_tokens, folder), fast(folder).vocab_size


@dataclass(frozen=True)
class Fast:
    """`inner`, the byte-pair encoder; coefficients are multiplied by `scale`, rounded, and moved up by `-lowest`, so
    that each is a character."""

    inner: prompts.Tokenizer
    scale: float
    lowest: int

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def encode(self, chunk: NDArray[np.float32]) -> list[int]:
        """The tokens of a chunk [T, A]."""
        coefficients = np.rint(cosine_basis(len(chunk)) @ chunk * self.scale).astype(np.int64) - self.lowest
        text = "".join(map(chr, coefficients.clip(0, _LAST_CHARACTER).reshape(-1).tolist()))
        return self.inner.inner.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]


@lru_cache(4)
def fast(folder: str) -> Fast:
    """The tokenizer that a folder holds. Raises `UserError` where it doesn't."""
    file = Path(folder).expanduser() / PROCESSOR
    try:
        options: dict[str, Any] = json.loads(file.read_text())
        return Fast(prompts.load(folder), float(options["scale"]), int(options["min_token"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"no FAST tokenizer can be read: {error!r}",
            where=str(file),
            remedy=f"name a folder with FAST's {prompts.FILE} and {PROCESSOR} (scale, min_token), or set "
            "model.action_tokens=binned",
        ) from error


@lru_cache(16)
def cosine_basis(num: int) -> NDArray[np.float64]:
    """[num, num]: the orthonormal cosine transform (DCT-II) as a matrix, frequencies by steps."""
    steps = np.arange(num)
    basis = np.cos(np.pi / num * (steps[None] + 0.5) * steps[:, None]) * np.sqrt(2.0 / num)
    basis[0] /= np.sqrt(2.0)
    return basis
