"""The mirror image of a sample: left is right, in pictures, actions, state and words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.bounds import within
from opentau_train.data.names import fits
from opentau_train.data.transforms.base import Record, SampleDraws, Transform
from opentau_train.errors import UserError


@dataclass(frozen=True)
class Mirror(Transform):
    """Mirrors samples with `probability`, in training. A source that uses it declares what that means for its robot:
    every dimension of state and actions keeps its value (`keep`), changes its sign (`negate`), or, where its name has
    a word of `swap` in it, takes the value of the dimension named with the other word. `negate` holds after `swap`.

    Names or patterns, `*` standing for any characters. Cameras named in pairs by `swap` change places, and the words
    change in prompts. `state_names` and `action_names` are the dataset's dimensions, which `for_names` fills in.
    """

    probability: Annotated[float, within(0.0, 1.0)]
    keep: tuple[str, ...] = ()
    negate: tuple[str, ...] = ()
    swap: dict[str, str] = field(default_factory=lambda: {"left": "right"})
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()

    reads: ClassVar = ("images", "state", "actions", "prompts")
    writes: ClassVar = ("images", "state", "actions", "prompts")
    training_only: ClassVar = True

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        if draws.uniform("mirror") >= self.probability:
            return record
        images = record["images"]
        others = {camera: self._other(camera) for camera in images}
        record["images"] = {
            others[c] if others[c] in images else c: np.ascontiguousarray(frames[:, :, ::-1])
            for c, frames in images.items()
        }
        for name, (source, sign) in self._dimensions.items():
            if name in record:
                record[name] = record[name][..., source] * sign
        record["prompts"] = tuple(self._words.sub(self._word, prompt) for prompt in record["prompts"])
        return record

    def for_names(self, state: tuple[str, ...], actions: tuple[str, ...]) -> Mirror:
        made = replace(self, state_names=state, action_names=actions)
        assert made._dimensions  # raises for what isn't declared
        return made

    @cached_property
    def _dimensions(self) -> Mapping[str, tuple[NDArray[np.int64], NDArray[np.float32]]]:
        return {"state": self._mirrored(self.state_names), "actions": self._mirrored(self.action_names)}

    def _mirrored(self, names: tuple[str, ...]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(which dimension [D] i64 each takes, its sign [D] f32). Raises `UserError` for what isn't declared."""
        place = [names.index(self._other(name)) if self._other(name) in names else i for i, name in enumerate(names)]
        negated = [any(fits(name, pattern) for pattern in self.negate) for name in names]
        kept = [any(fits(name, pattern) for pattern in self.keep) for name in names]
        swapped = [i != other for i, other in enumerate(place)]
        told = [n != k or (s and not n) for n, k, s in zip(negated, kept, swapped, strict=True)]
        if not all(told):
            undeclared = [name for name, is_told in zip(names, told, strict=True) if not is_told]
            raise UserError(
                f"what mirroring does to {', '.join(undeclared)} is not declared, or twice",
                where="transforms",
                remedy="name each under `keep` or under `negate` of the mirror, or leave the mirror out",
            )
        return np.array(place, np.int64), np.where(negated, -1, 1).astype(np.float32)

    @cached_property
    def _pairs(self) -> dict[str, str]:
        return {**self.swap, **{right: left for left, right in self.swap.items()}}

    @cached_property
    def _words(self) -> re.Pattern[str]:
        return re.compile(rf"\b({'|'.join(map(re.escape, self._pairs)) or '(?!)'})\b", re.IGNORECASE)

    def _word(self, match: re.Match[str]) -> str:
        other = self._pairs[match[0].lower()]
        return other.capitalize() if match[0][0].isupper() else other

    def _other(self, name: str) -> str:
        """The name with each word of `swap` in it replaced by the other, or the same name."""
        pattern = "|".join(map(re.escape, self._pairs)) or "(?!)"
        return re.sub(pattern, lambda match: self._pairs[match[0]], name)
