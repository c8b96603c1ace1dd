"""The groups of a mixture: a dataset's episodes of one control mode, and what each weighs in aggregates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from opentau_train.data.mixture.mixture import Dataset
from opentau_train.data.source import Source
from opentau_train.types import Group


def groups_of(source: Source) -> list[Group]:
    """A group for each control mode that an episode of the source has, by rising code; shares are not known yet."""
    table = source.episodes
    modes = [table.control_modes[code] for code in np.unique(table.control_mode)]
    return [Group(source.name, mode, f"{source.robot_type}::{mode}", share=0.0) for mode in modes]


def with_shares(groups: Sequence[Group], datasets: Sequence[Dataset], draws: Sequence[int]) -> list[Group]:
    """Groups with their weight in aggregates: the dataset's, split by the group's training windows.

    The dataset's weight is what no other dataset changes, its windows or its configured weight, wherever either is
    set throughout: normalised shares would round another way each time that a dataset joins. A group without training
    windows has weight 0: an aggregate speaks of the mixture that is trained on.
    """
    trained = [d for d, drawn in zip(datasets, draws, strict=True) if drawn]
    natural = all(d.settings.weight is None for d in trained)
    weighted = all(d.settings.weight is not None for d in trained)
    share = np.zeros(len(groups))
    for dataset, drawn in zip(datasets, draws, strict=True):
        windows_of = np.bincount(
            dataset.group_of[dataset.train.episode], weights=dataset.train.length, minlength=len(groups)
        )
        if drawn and natural:
            share += windows_of
        elif drawn:
            weight = dataset.settings.weight if weighted else drawn
            share += weight * (windows_of / windows_of.sum())
    return [dataclasses.replace(g, share=float(s)) for g, s in zip(groups, share, strict=True)]
