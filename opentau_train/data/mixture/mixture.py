"""The mixture: all datasets of a run, with their split, groups, statistics and transforms. `open.py` makes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.data import DataSettings, SourceSettings
from opentau_train.config.modes import WITH_FUTURE
from opentau_train.data.chunk import chunk_places, chunk_rows, chunks_reaching, row_step, rows_at
from opentau_train.data.convention import Part
from opentau_train.data.conventions.between import RotationsBetween, rotations_between
from opentau_train.data.conventions.steps import Conversions
from opentau_train.data.decode.video import OpenDecoders, reader_bytes
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.order.tape import VERSION, Tape
from opentau_train.data.source import PromptedSource, Source
from opentau_train.data.transforms.base import Transforms, Wants
from opentau_train.data.transforms.pipeline import Pipeline, meet
from opentau_train.data.transforms.shape import Pad
from opentau_train.types import BatchSpec, Group, WindowSpec

_WINDOWS_AT_ONCE = 1024
"""Windows of an episode that are transformed together for the statistics: some megabytes."""


@dataclass(frozen=True)
class Dataset:
    """One dataset of the mixture: its source, its settings, its split, and its blocks for training and for validation.

    `repo_id` is its name in batches, different from all others'; `held_out` [E] says which episodes are for validation;
    `group_of` [E] i64 the group of each episode of its table, in the dataset's first mode; those of its other modes
    follow it.
    `transforms` are its `conversions` and those that the configuration names, after which the dimensions have the names
    `state_names` and `action_names`.
    """

    index: int
    name: str
    repo_id: str
    settings: SourceSettings
    source: Source
    chunk_length: int
    held_out: NDArray[np.bool_]
    train: DatasetBlocks
    validation: DatasetBlocks
    group_of: NDArray[np.int64]
    conversions: Conversions
    transforms: Transforms
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]

    def columns(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray, NDArray]]:
        """(position, state [L, S], actions [L, A]) of the episodes at `positions`, after the dataset's own
        `transforms`: the values that statistics are computed from."""
        pipeline = Pipeline(self.transforms)
        for position, state, actions in self.source.columns(positions):
            yield position, *pipeline.rows(state, actions)

    def chunks(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray, list[NDArray]]]:
        """The same with the chunks that start at each row: (position, state [L, S], of each step of a chunk the actions
        [n, A] of the first n rows, whose chunks reach as far). Steps are placed by the dataset's nominal rate."""
        pipeline, offsets = Pipeline(self.transforms), self.chunk_offsets
        for position, state, actions in self.source.columns(positions):
            made = []
            for start in range(0, len(state), _WINDOWS_AT_ONCE):
                frames = np.arange(start, min(start + _WINDOWS_AT_ONCE, len(state)))
                rows, _ = rows_at(actions, (frames[:, None] + offsets).ravel(), between=self.between)
                made.append(pipeline.rows(state[frames], rows.reshape(len(frames), len(offsets), -1)))
            states, chunks = (np.concatenate(values) for values in zip(*made, strict=True))
            whole = chunks_reaching(len(state), offsets)
            yield position, states, [chunks[:n, k] for k, n in enumerate(whole.tolist())]

    @property
    def robot_parts(self) -> tuple[Part | None, ...]:
        """[A'] what the source declares of each dimension of its actions; None = nothing."""
        return self.conversions.robot_parts["actions"] or (None,) * len(self.conversions.robot_names)

    def robot(self) -> dict[str, Any]:
        """What the dataset's robot sees, is and is told, in its own dimensions, for a checkpoint."""
        return {
            "cameras": list(self.source.cameras),
            "videos": list(self.source.frame_sizes),
            "state_names": list(self.source.state_names),
            "action_names": list(self.conversions.robot_names),
            "convention": self.conversions.robot_convention.to_json(),
            "fps": self.settings.fps or self.source.fps,
            "chunk_length": self.chunk_length,
        }

    def window(self, spec: BatchSpec) -> WindowSpec:
        """What is read of each window, for the mixture's batches."""
        size = Pipeline(self.transforms).picture_size(spec.image_size)
        some = set(self.settings.modes) & set(WITH_FUTURE)
        cameras = tuple(c for c in spec.future_cameras if some and c in self.source.cameras)
        future = spec.future if cameras else 0, spec.future_stride, cameras
        return WindowSpec(
            *(self.chunk_length, spec.history, size, self.settings.fps, *future),
            between=self.between,
            scaling=spec.scaling,
        )

    def decoders(self, window: WindowSpec) -> OpenDecoders:
        """The decoders that one cursor keeps open to read such windows."""
        assert window.image_size is not None, "a batch has a size of pictures"
        rows = chunk_rows(window.future * window.future_stride + 1, row_step(self.source.fps, window.fps)) - 1
        sizes = self.source.frame_sizes.items()
        held = [reader_bytes(size, window.image_size, rows * (c in window.future_cameras)) for c, size in sizes]
        return OpenDecoders(len(held), sum(held))

    @property
    def between(self) -> RotationsBetween | None:
        """What of its actions isn't on a straight line from row to row, as far as the source declares it."""
        return rotations_between(self.conversions.declared, self.source.action_names)

    @property
    def chunk_offsets(self) -> NDArray[np.float64]:
        """[T] the rows from a chunk's start to each of its steps, at the dataset's nominal rate."""
        return chunk_places(0, self.chunk_length, row_step(self.source.fps, self.settings.fps))


@dataclass(frozen=True)
class Mixture:
    """All datasets, sorted by name, so that permuting a configuration changes nothing.

    `draws` are the windows n_d that an epoch takes of each dataset; `groups` are the pairs (dataset, control mode), and
    where samples have several modes, triples with the mode;
    `stats` {norm head: statistics}; `pipelines` are each dataset's transforms (none where no statistics were computed).
    """

    settings: DataSettings
    seed: int
    datasets: tuple[Dataset, ...]
    draws: tuple[int, ...]
    groups: tuple[Group, ...]
    stats: dict[str, HeadStats]
    pipelines: tuple[Pipeline, ...]
    spec: BatchSpec

    def in_shape(self, spec: BatchSpec) -> Mixture:
        """The same mixture with batches of another shape, no dimension of which is smaller."""
        spec = dataclasses.replace(spec, modes=self.spec.modes, fields=self.spec.fields)
        pipelines = []
        for pipeline in self.pipelines:
            pad = pipeline.transforms["pad"]
            assert isinstance(pad, Pad), "`mixture.open` puts it there"
            wide = dataclasses.replace(
                pad, state_dim=spec.state_dim, action_dim=spec.action_dim, chunk_length=spec.chunk_length
            )
            pipelines.append(Pipeline({**pipeline.transforms, "pad": wide}))
        return dataclasses.replace(self, pipelines=tuple(pipelines), spec=spec)

    def for_policy(self, wants: Wants) -> Mixture:
        """The same mixture, its samples made ready for a policy. Raises `UserError` for what the mixture hasn't."""
        spec = meet(self.spec, wants)
        pipelines = tuple(Pipeline({**p.transforms, **wants.transforms}) for p in self.pipelines)
        return dataclasses.replace(self, pipelines=pipelines, spec=spec)

    def check_prompts(self, wants: Wants) -> None:
        """Raises `UserError` for a prompt that a policy would refuse when it is read, of sources that can tell."""

        def prompts() -> Iterator[tuple[str, int]]:
            for dataset in self.datasets:
                if isinstance(dataset.source, PromptedSource):
                    positions = np.arange(len(dataset.source.episodes))
                    yield from ((text, len(dataset.state_names)) for text in dataset.source.prompts(positions))

        for transform in wants.transforms.values():
            transform.check_prompts(prompts)

    def tape(self, batch_size: int, version: int = VERSION) -> Tape:
        """The plan of the training stream for a global batch of `batch_size` samples, in the order of that version."""
        return Tape(
            [d.train for d in self.datasets],
            list(self.draws),
            seed=self.seed,
            batch_size=batch_size,
            lanes_per_sample=self.settings.lanes_per_sample,
            phase_rows=self.settings.phase_rows,
            version=version,
        )
