"""The transforms of one dataset, in their order: from its windows to samples, from observations to batches, and from
predicted chunks back to the robot's units. Saved with a checkpoint as data, so that training and robot can't differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.typed import TARGET, instantiate
from opentau_train.data.batch import Batch, stack
from opentau_train.data.fields import Field
from opentau_train.data.transforms.base import Record, SampleDraws, Transform, Transforms, Wants
from opentau_train.errors import UserError, did_you_mean
from opentau_train.types import BatchSpec


@dataclass(frozen=True)
class Pipeline:
    """One dataset's `transforms` {name: transform}, in the order in which they are made."""

    transforms: Transforms

    def __call__(self, record: Record, key: int, *, training: bool) -> Record:
        """The record after all transforms, elsewhere as `evaluate` makes them. `key` is the sample's."""
        record = dict(record)
        for name, transform in self.transforms.items():
            record = (transform if training else transform.evaluate)(record, SampleDraws(key, name))
        return record

    @property
    def per_chunk(self) -> bool:
        """Whether an action comes out differently in a chunk that starts elsewhere."""
        return any(transform.per_chunk for transform in self.transforms.values())

    def picture_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) that pictures are to be read in, for the last transform to leave them inside `size`."""
        for transform in reversed(list(self.transforms.values())):
            size = transform.picture_size(size)
        return size

    def rows(self, state: NDArray, actions: NDArray) -> tuple[NDArray, NDArray]:
        """An episode's rows [L, S] and [L, A] as the transforms leave them outside training, for statistics; or the
        chunks [L, T, A] that start at these states."""
        record: Record = {"state": state, "actions": actions}
        for name, transform in self.transforms.items():
            if {"state", "actions"} & set(transform.writes):
                record = transform.evaluate(record, SampleDraws(0, name))
        return record["state"], record["actions"]

    def units(self, actions: NDArray[np.float32], norm_head: str, **record: Any) -> NDArray[np.float32]:
        """A chunk [..., T, A] as a policy predicts it -> [..., T, A'] in the units and dimensions of the robot that
        `norm_head` names. `record`: what else an inverse needs, such as the sample's `state`."""
        record |= {"actions": actions, "norm_head": norm_head}
        for transform in reversed(list(self.transforms.values())):
            record = transform.inverse(record)
        return record["actions"]

    def observe(self, observations: Sequence[Mapping[str, Any]], norm_head: str, spec: BatchSpec) -> Batch:
        """A batch of what robots see, for `Policy.sample_actions`.

        An observation has `images` {camera: [H, W, 3] or [h+1, H, W, 3] uint8 RGB, at most as large as
        `picture_size` of the batch's}, `state` [S'] in the dataset's units and `prompt`; cameras may be missing. `spec`
        is the batch's, with the policy's fields. Raises `UserError` for a camera that the policy doesn't know, and
        pictures of another form.
        """
        samples, size = [], self.picture_size(spec.image_size)
        for number, observation in enumerate(observations):
            record: Record = {
                "images": {c: _frames(c, v, spec, size) for c, v in observation.get("images", {}).items()},
                "state": np.asarray(observation.get("state", ()), np.float32),
                "prompts": (observation["prompt"],) if observation.get("prompt") else (),
                "norm_head": norm_head,
            }
            samples.append(self(record, number, training=False) | {"key": number, "weight": 1.0})
        return stack(samples, spec)

    def to_json(self) -> list[dict[str, Any]]:
        """Each transform's name, class and options, in their order."""
        return [{"name": name, TARGET: _path(type(t)), **_options(t)} for name, t in self.transforms.items()]

    @classmethod
    def from_json(cls, tree: Sequence[Mapping[str, Any]]) -> Pipeline:
        """What `to_json` wrote, built again. Raises `UserError` for a class that isn't there or options that it doesn't
        take."""
        made: dict[str, Transform] = {}
        for entry in tree:
            name = entry["name"]
            made[name] = instantiate({k: v for k, v in entry.items() if k != "name"}, f"transforms.{name}")
        return cls(made)


def compose(
    groups: Sequence[Mapping[str, Mapping[str, Any]]],
    state: tuple[str, ...],
    actions: tuple[str, ...],
    path: str,
    first: Transforms = MappingProxyType({}),
) -> tuple[dict[str, Transform], tuple[str, ...], tuple[str, ...]]:
    """(transforms, names of the state's dimensions after them, and of the actions') from the configuration's trees
    {name: {_target_, options}}, one group after the other, for a dataset whose dimensions have the names `state` and
    `actions` after those that are made `first`. Raises `UserError` for mistakes."""
    made = dict(first)
    for group in groups:
        for name, tree in group.items():
            if name in made:
                raise UserError(f"two transforms are named '{name}'", where=path, remedy="rename one of them")
            transform = instantiate(tree, f"{path}.{name}").for_names(state, actions)
            state, actions = transform.names(state, actions)
            made[name] = transform
    return made, state, actions


def meet(spec: BatchSpec, wants: Wants) -> BatchSpec:
    """The batch of a mixture with the fields that a policy's transforms add. Raises `UserError` for what the policy
    needs and the mixture hasn't."""
    if wants.image_size is not None and spec.cameras and spec.image_size != wants.image_size:
        height, width = wants.image_size
        raise UserError(
            f"the policy takes pictures of {height}x{width} (H x W), the data gives "
            f"{spec.image_size[0]}x{spec.image_size[1]}",
            where="data.image_size",
            remedy=f"set data.image_size=[{height},{width}]",
        )
    return with_fields(spec, wants.transforms.values())


def with_fields(spec: BatchSpec, transforms: Iterable[Transform]) -> BatchSpec:
    """The batch with the fields that transforms add. Raises `UserError` where two declare one differently."""
    fields: dict[str, Field] = {field.name: field for field in spec.fields}
    for transform in transforms:
        for field in transform.fields(spec):
            if fields.setdefault(field.name, field) != field:
                raise UserError(
                    f"two transforms declare the field '{field.name}' differently: {fields[field.name]} and {field}",
                    where=_path(type(transform)),
                    remedy="let one of them write another name",
                )
    return dataclasses.replace(spec, fields=tuple(fields.values()))


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _options(transform: Transform) -> dict[str, Any]:
    assert dataclasses.is_dataclass(transform), f"the transform {_path(type(transform))} is no dataclass"
    return {f.name: _plain(getattr(transform, f.name)) for f in dataclasses.fields(transform)}


def _plain(value: Any) -> Any:
    """An option as data: dataclasses in a tuple as mappings."""
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return tuple(dataclasses.asdict(item) for item in value)
    return value


def _frames(camera: str, image: NDArray[np.uint8], spec: BatchSpec, size: tuple[int, int]) -> NDArray[np.uint8]:
    """[h+1, H, W, 3], H and W inside `size`: a single picture stands for the frames before it too. Raises
    `UserError`."""
    if camera not in spec.cameras:
        raise UserError(
            f"the policy has no camera '{camera}'{did_you_mean(camera, spec.cameras)}",
            where="the observation",
            remedy=f"its cameras are {', '.join(spec.cameras) or 'none'}",
        )
    frames = np.asarray(image)
    if frames.ndim == 3:
        frames = np.broadcast_to(frames, (spec.history + 1, *frames.shape))
    inside = frames.ndim == 4 and frames.shape[1] <= size[0] and frames.shape[2] <= size[1]
    if frames.dtype != np.uint8 or not inside or frames.shape[0] != spec.history + 1 or frames.shape[-1] != 3:
        raise UserError(
            f"camera '{camera}' gives {frames.dtype} {list(frames.shape)}",
            where="the observation",
            remedy=f"give [{spec.history + 1}, H, W, 3] uint8 RGB, H and W at most {list(size)}",
        )
    return frames
