"""Prompts as tokens: a tokenizer that the user names, or bytes, and pi0's and pi0.5's published forms of prompts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.fields import Field
from opentau_train.data.transforms.base import Record, SampleDraws, Transform
from opentau_train.errors import UserError
from opentau_train.types import BatchSpec

NO_TOKEN = -1
"""What token fields are filled up with: no tokenizer has it."""
FILE = "tokenizer.json"
NUM_BYTE_TOKENS = 259
_START, _FIRST_BYTE = 2, 3  # as Gemma and ByT5 number them
_STATE_BINS = 256
_BIN_CENTRES = (-2.0, *(np.arange(_STATE_BINS) * 2 + 1 - _STATE_BINS) / _STATE_BINS)
"""A value of each bin of the state, what lies below them all first."""

Overflow = Literal["cut", "error"]


def clean(text: str) -> str:
    """The task as both forms of prompts have it: one line, words apart."""
    return text.strip().replace("_", " ").replace("\n", " ")


def pi0_prompt(text: str, state: NDArray[np.float32]) -> str:
    return clean(text) + "\n"


def pi05_prompt(text: str, state: NDArray[np.float32]) -> str:
    """With the normalised `state` [S'] in it, each dimension as the number of its bin of 256 between -1 and 1; what
    lies below is -1, what lies above 255, as in openpi and LeRobot."""
    edges = np.linspace(-1, 1, _STATE_BINS + 1)[:-1]
    numbers = " ".join(map(str, (np.digitize(state, edges) - 1).tolist()))
    return f"Task: {clean(text)}, State: {numbers};\nAction: "


def plain_prompt(text: str, state: NDArray[np.float32]) -> str:
    return clean(text)


FORMS: dict[str, Callable[[str, NDArray[np.float32]], str]] = {
    "pi0": pi0_prompt,
    "pi05": pi05_prompt,
    "plain": plain_prompt,
}


@dataclass(frozen=True)
class TokenizePrompt(Transform):
    """`prompt_tokens` [`num_tokens`] int64: the prompt in the form `form`, filled up with `NO_TOKEN`.

    `tokenizer` is a tokenizer.json or its folder, None: the UTF-8 bytes. A prompt of more tokens is cut, or with
    `overflow` error refused; `prompt_is_cut` [] bool says whether it was.
    """

    form: str
    num_tokens: int
    tokenizer: str | None = None
    overflow: Overflow = "cut"

    reads: ClassVar = ("prompt", "state", "state_dim_mask")
    writes: ClassVar = ("prompt_tokens", "prompt_is_cut")

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        tokens, cut = self.tokens(record["prompt"], record["state"][record["state_dim_mask"]])
        record["prompt_tokens"], record["prompt_is_cut"] = tokens, cut
        return record

    def tokens(self, text: str, state: NDArray[np.float32]) -> tuple[NDArray[np.int64], bool]:
        """The tokens, and whether some were cut off. Raises `UserError` where they may not be."""
        ids = self._ids(text, state)
        if len(ids) > self.num_tokens and self.overflow == "error":
            raise self._too_long(text, len(ids))
        tokens = np.full(self.num_tokens, NO_TOKEN, np.int64)
        tokens[: len(ids)] = ids[: self.num_tokens]
        return tokens, len(ids) > self.num_tokens

    def check_prompts(self, prompts: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """See `Transform.check_prompts`. A state in the prompt is taken to be the one of the most tokens."""
        if self.overflow != "error":
            return
        lengths = {(text, dims): len(self._ids(text, self._longest_state(dims))) for text, dims in set(prompts())}
        (text, _), length = max(lengths.items(), key=lambda item: item[1], default=(("", 0), 0))
        if length > self.num_tokens:
            raise self._too_long(text, length)

    def longest(self, record: Record) -> Record:
        if record["prompt"] is None:
            return {**record, "prompt_tokens": np.zeros(self.num_tokens, np.int64)}
        state = self._longest_state(int(record["state_dim_mask"].sum()))
        return {**record, "prompt_tokens": self.tokens(record["prompt"], state)[0]}

    def _longest_state(self, dims: int) -> NDArray[np.float32]:
        return np.full(dims, _longest_bin(self.form, self.tokenizer), np.float32)

    def _ids(self, text: str, state: NDArray[np.float32]) -> list[int]:
        return encoder(self.tokenizer)(FORMS[self.form](text, state))

    def _too_long(self, text: str, length: int) -> UserError:
        return UserError(
            f"a prompt has {length} tokens, the policy takes {self.num_tokens}: '{text[:60]}'",
            where="model.max_prompt_tokens",
            remedy=f"set model.max_prompt_tokens={length}, or model.prompt_overflow=cut",
        )

    def fields(self, spec: BatchSpec) -> tuple[Field, ...]:
        prompt = Field("prompt_tokens", (self.num_tokens,), np.int64, NO_TOKEN)
        return prompt, Field("prompt_is_cut", (), np.bool_, False)


@lru_cache(16)
def _longest_bin(form: str, tokenizer: str | None) -> float:
    """A state of the most tokens in a prompt."""
    return max(_BIN_CENTRES, key=lambda value: len(encoder(tokenizer)(FORMS[form]("", np.full(1, value, np.float32)))))


def encoder(tokenizer: str | None) -> Callable[[str], list[int]]:
    """Text to the numbers of its tokens, the start token first. Raises `UserError` as `load` does."""
    return _bytes if tokenizer is None else load(tokenizer).encode_ids


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json of the `tokenizers` library, whose numbers are below `vocab_size`; it may skip some."""

    inner: object
    start: tuple[int, ...]
    vocab_size: int

    def encode_ids(self, text: str) -> list[int]:
        ids = self.inner.encode(text).ids  # type: ignore[attr-defined]
        return ids if tuple(ids[: len(self.start)]) == self.start else [*self.start, *ids]


@lru_cache(4)
def load(path: str, where: str = "model.tokenizer_path") -> Tokenizer:
    """The tokenizer of a tokenizer.json or of the folder that holds it; `where`: the setting that names it. Raises
    `UserError` where there is none."""
    try:
        import tokenizers
    except ImportError as error:
        raise missing_extra("tokenizers", error) from error
    file = Path(path).expanduser()
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise UserError(
            f"there is no tokenizer: {file}",
            where=where,
            remedy=f"name a {FILE} or a folder with one, such as that of the weights; null: bytes",
        )
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # broad: the library raises plain Exception for whatever it can't read
        raise UserError(
            f"the tokenizer can't be read: {error}",
            where=str(file),
            remedy=f"name a {FILE} of the tokenizers library; a SentencePiece model must be converted to one",
        ) from error
    inner.no_padding()
    inner.no_truncation()
    start = inner.token_to_id("<bos>")
    return Tokenizer(inner, () if start is None else (start,), 1 + max(inner.get_vocab().values(), default=-1))


def check_vocabulary(tokenizer: str | None, size: int) -> None:
    """Raises `UserError` where the tokenizer has more tokens than a table of `size`."""
    num = NUM_BYTE_TOKENS if tokenizer is None else load(tokenizer).vocab_size
    if num > size:
        raise UserError(
            f"the tokenizer has {num} tokens, the language model's table {size}",
            where="model.tokenizer_path",
            remedy=f"name the tokenizer of the weights, or set model.vlm.vocab_size={num} to train from scratch",
        )


def check_installed(package: str, extra: str = "vla") -> None:
    """Raises `UserError` where a package of an extra isn't there, without importing it."""
    if importlib.util.find_spec(package) is None:
        raise missing_extra(package, ImportError("it isn't installed"), extra)


def missing_extra(package: str, error: ImportError, extra: str = "vla") -> UserError:
    """The answer where a package of an extra isn't installed."""
    return UserError(
        f"this policy needs the package {package}: {error}",
        where="model._target_",
        remedy=f'pip install "opentau_train[{extra}]"',
    )


def _bytes(text: str) -> list[int]:
    return [_START, *(byte + _FIRST_BYTE for byte in text.encode())]
