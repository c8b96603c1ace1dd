"""The groups of a mixture: a dataset's samples of one control mode and mode, and what each weighs in aggregates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from opentau_train.data.mixture.mixture import Dataset
from opentau_train.data.source import Source
from opentau_train.types import Group


def groups_of(source: Source, modes: Iterable[str]) -> list[Group]:
    """A group for each control mode that an episode of the source has, by rising code, and each of the `modes` of its
    samples; shares are not known yet."""
    table = source.episodes
    kinds = [table.control_modes[code] for code in np.unique(table.control_mode)]
    return [Group(source.name, kind, f"{source.robot_type}::{kind}", 0.0, mode) for kind in kinds for mode in modes]


def with_shares(groups: Sequence[Group], datasets: Sequence[Dataset], draws: Sequence[int]) -> list[Group]:
    """Groups with their weight in aggregates: the dataset's, split by the group's training samples.

    The dataset's weight is what no other dataset changes, its windows or its configured weight, wherever either is
    set throughout: normalised shares would round another way each time that a dataset joins. A group without training
    windows has weight 0: an aggregate speaks of the mixture that is trained on.
    """
    trained = [d for d, drawn in zip(datasets, draws, strict=True) if drawn]
    natural = all(d.settings.weight is None for d in trained)
    weighted = all(d.settings.weight is not None for d in trained)
    share = np.zeros(len(groups))
    for dataset, drawn in zip(datasets, draws, strict=True):
        windows_of, group_of = np.zeros(len(groups)), dataset.group_of[dataset.train.episode]
        for place, part in enumerate(dataset.settings.modes.values()):
            windows_of += np.bincount(group_of + place, weights=part * dataset.train.length, minlength=len(groups))
        if drawn and natural:
            share += windows_of
        elif drawn:
            weight = dataset.settings.weight if weighted else drawn
            share += weight * (windows_of / windows_of.sum())
    return [dataclasses.replace(g, share=float(s)) for g, s in zip(groups, share, strict=True)]
