"""What is known of packed tokens before a window is read: settings that don't go together, and the largest windows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Protocol

import numpy as np

from opentau_train.config.data import SourceSettings
from opentau_train.config.modes import WITH_FUTURE
from opentau_train.config.settings import Settings
from opentau_train.data.batch import Batch
from opentau_train.data.fields import PictureField, fields_of
from opentau_train.data.source import PromptedSource, Source
from opentau_train.data.transforms.base import Record
from opentau_train.data.transforms.pipeline import meet
from opentau_train.errors import UserError
from opentau_train.models.packing.cut import CAP
from opentau_train.models.policy import Policy
from opentau_train.types import BatchSpec

Window = tuple[str | None, int, str]
"""A window's prompt (None: it isn't known), its number of real steps, and its mode."""


class Described(Protocol):
    """A dataset of the mixture (`data.mixture.mixture.Dataset`), as far as its windows' tokens depend on it."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> Source: ...
    @property
    def settings(self) -> SourceSettings: ...
    @property
    def chunk_length(self) -> int: ...
    @property
    def state_names(self) -> tuple[str, ...]: ...
    @property
    def action_names(self) -> tuple[str, ...]: ...


def check_packing(settings: Settings) -> None:
    """Raises `UserError` for a cap on tokens that nothing would read, and for packed tokens that would be compiled."""
    packs, cap = settings.model.get("packing") is True, settings.data.max_num_tokens_after_packing
    if cap != -1 and not packs:
        raise UserError(
            f"{CAP}={cap} caps packed tokens, and {settings.model.get('_target_')} packs none with these settings",
            where=CAP,
            remedy=f"set {CAP}=-1 and data.max_samples_per_batch=8, or model.packing=true with a model that has it "
            "(docs/models.md)",
        )
    if packs and settings.trainer.compile:
        raise UserError(
            "model.packing=true with trainer.compile=true: packed tokens have another shape in each micro-batch, and "
            "each would be compiled for",
            where="trainer.compile",
            remedy="set trainer.compile=false, or model.packing=false",
        )


def check_cap(policy: Policy, datasets: Iterable[Described], spec: BatchSpec, cap: int) -> None:
    """Raises `UserError` where a window of one of `datasets`, of batches of the form `spec`, may have more tokens than
    `cap` (-1: any number)."""
    if cap == -1:
        return
    most = {}
    for dataset in datasets:
        each = product(prompts_of(dataset), dataset.settings.modes)
        windows = [(prompt, dataset.chunk_length, mode) for prompt, mode in each]
        most[dataset.name] = int(policy.num_tokens(sketched(policy, dataset, spec, windows)).sum(1).max())
    name, num = max(most.items(), key=lambda item: item[1])
    if num > cap:
        raise UserError(
            f"a window of dataset '{name}' has up to {num} tokens, more than a micro-batch may have",
            where=f"{CAP}={cap}",
            remedy=f"set {CAP}={num} or more, or leave out cameras, data.history or a part of the prompts",
        )


def prompts_of(dataset: Described) -> list[str | None]:
    """The dataset's prompts, each once; None where it can't tell them. Reads no video."""
    if not isinstance(dataset.source, PromptedSource):
        return [None]
    return [*sorted(set(dataset.source.prompts(np.arange(len(dataset.source.episodes)))))] or [""]


def sketched(policy: Policy, dataset: Described, spec: BatchSpec, windows: Iterable[Window]) -> Batch:
    """Windows of the dataset as far as metadata tell of them, without pictures: all cameras and future frames are
    there, and what the policy's transforms write is as long as it may be. `spec` is that of the mixture."""
    wants = policy.wants()
    spec = meet(spec, wants)
    samples = []
    for prompt, steps, mode in windows:
        foreseen = [camera for camera in spec.future_cameras if camera in dataset.source.cameras]
        record: Record = {
            "images": dict.fromkeys(dataset.source.cameras),
            "future": dict.fromkeys(foreseen if mode in WITH_FUTURE else ()),
            "future_is_pad": np.full(spec.future, mode not in WITH_FUTURE),
            "prompt": prompt,
            "mode": mode,
            "state_dim_mask": np.arange(spec.state_dim) < len(dataset.state_names),
            "action_is_pad": np.arange(spec.chunk_length) >= steps,
            "action_dim_mask": np.arange(spec.action_dim) < len(dataset.action_names),
            "weight": 1.0,
        }
        for transform in wants.transforms.values():
            record = transform.longest(record)
        samples.append(record)
    fields = tuple(field for field in fields_of(spec) if not isinstance(field, PictureField))
    return Batch(fields, {field.name: field.stack(samples, spec) for field in fields})
