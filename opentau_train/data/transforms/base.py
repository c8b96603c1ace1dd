"""What a transform is, and the keyed random numbers that it may draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from opentau_train import rng
from opentau_train.data.fields import Field
from opentau_train.types import BatchSpec

Record = dict[str, Any]
"""A window on its way to a sample, or an observation on its way to a policy: {name: value}.

It begins with `images` {camera: [h+1, H, W, 3] uint8 RGB}, `state` [S] f32, `prompts` (texts to choose from),
`norm_head` and, for a window of a dataset, `actions` [T, A] f32, `action_is_pad` [T] bool, `mode`, where it comes from
(dataset, episode, frame, pass), and whatever else its source reads (`RawWindow.extra`). A sample whose mode has future
frames has them behind the others, [h+1+F, H, W, 3], so that what is done to a camera's pictures is done to all of them,
and `future_is_pad` [F] bool.

A record of N windows at once has a row for each in its arrays [N, ...] and lists [N]; other values are all windows'.
"""


class SampleDraws:
    """The random numbers of one transform for one sample: functions of the sample's key, the transform's name and what
    the number is for, so that no transform's numbers depend on which others there are."""

    __slots__ = ("key", "transform")

    def __init__(self, key: int, transform: str):
        self.key, self.transform = key, transform

    def uniform(self, *what: str) -> float:
        """A number in [0, 1) for the purpose named by `what`: the same each time that it is asked for."""
        return rng.uniform_at(rng.fold_one(self.key, _name_key(self.transform, what)), 0)


@cache
def _name_key(transform: str, what: tuple[str, ...]) -> int:
    # 63 bits: `rng.fold`, which must be able to make the same numbers for many samples, takes its columns as int64.
    return rng.key("transform", transform, *what) >> 1


class Transform:
    """One step, as a frozen dataclass whose fields are its options.

    A call takes a record and returns it with other values. It never writes into the arrays that it is given, since a
    source's arrays serve several windows. What it draws comes from `draws`. Its class states what it reads and writes;
    what is absent, as the actions of an observation are, is passed over.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    training_only: ClassVar[bool] = False
    """True = left out where nothing may be random or dropped: in validation and on a robot."""
    broadcasts: ClassVar[bool] = False
    """True = a call draws nothing, and does with a record of N windows at once what it does with each."""

    @property
    def per_chunk(self) -> bool:
        """True = what becomes of an action depends on where its chunk starts. Statistics are then of chunks, not of
        rows: the call is given `actions` [N, T, A] and `state` [N, S] of N windows at once."""
        return False

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        raise TypeError(f"{type(self).__name__} has no __call__, which every transform must have")

    def evaluate(self, record: Record, draws: SampleDraws) -> Record:
        """What takes the call's place in validation and on a robot: the call, or nothing where it is for training
        only."""
        return record if self.training_only else self(record, draws)

    def many(self, record: Record, num: int) -> Record | None:
        """The record of N windows at once: bit for bit what calls give of each, in training as elsewhere. None where
        the class knows no way but one after another."""
        return self(record, SampleDraws(0, "")) if self.broadcasts else None

    def picture_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) that pictures are to be read in, for the transform to give them inside `size`."""
        return size

    def inverse(self, record: Record) -> Record:
        """Take `actions` [..., T, A] (and `state`, where it is there) back to what the call was given. What has no
        inverse, or changes neither, leaves them."""
        return record

    def fields(self, spec: BatchSpec) -> tuple[Field, ...]:
        """The fields that the transform adds to the batch, none by default."""
        return ()

    def for_names(self, state: tuple[str, ...], actions: tuple[str, ...]) -> Transform:
        """The same transform for a dataset whose dimensions have these names. Raises `UserError` where it can't be."""
        return self

    def check_prompts(self, prompts: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """Raises `UserError` for a prompt that a call would refuse. `prompts()` reads the datasets' pairs of a prompt
        and the number of the state's dimensions beside it, which may take long: what refuses none doesn't ask."""

    def longest(self, record: Record) -> Record:
        """The record with what a call would write, as long as it may be, for a window of which only metadata are known:
        `prompt` (None: not even that), the masks of dims and steps. What a policy's tokens are counted by."""
        return record

    def names(self, state: tuple[str, ...], actions: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the state's and actions' dimensions after the transform, given those before it."""
        return state, actions


Transforms = Mapping[str, Transform]
"""{name: transform}, in the order in which they are made. The name keys what the transform draws."""


@dataclass(frozen=True)
class Wants:
    """What a policy needs of the data: its own transforms, made in the loader's workers after all others; (H, W) of
    pictures, where it can take no other."""

    transforms: Transforms = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
