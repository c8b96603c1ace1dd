"""Gathers what the page on a mixture shows, within bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.settings import Settings
from opentau_train.data.lint.judge import Judged
from opentau_train.data.lint.reading import chosen_episodes, is_fetched
from opentau_train.data.lint.report import lint
from opentau_train.data.mixture.keyframes import with_keyframes
from opentau_train.data.mixture.mixture import Dataset, Mixture
from opentau_train.data.mixture.open import open_plan
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.errors import UserError
from opentau_train.tools.inspecting.clips import films
from opentau_train.tools.inspecting.page import Inspected
from opentau_train.tools.inspecting.rows import read, read_statistics
from opentau_train.tools.inspecting.sheet import blocks, sheet

__all__ = ["filmed", "look", "opened", "sheet"]

MOST_SOURCES = 12
"""Of a mixture whose rows and pictures are read."""
JUDGED = 20
"""Episodes of a source that its conventions are judged by, as `tools.check` does."""


def opened(settings: Settings) -> Mixture:
    """The mixture as far as metadata tell it. Raises `UserError`, as a training does."""
    return with_keyframes(open_plan(settings, resolve_sources(settings)), settings.paths.cache)


def filmed(dataset: Dataset, num: int) -> list[int]:
    """The places of the episodes that are shown: evenly over the dataset; where files would be fetched, one."""
    if not dataset.source.cameras or not num:
        return []
    return chosen_episodes(dataset.source, num).tolist()[: 1 if is_fetched(dataset.source) else num]


def look(settings: Settings, mixture: Mixture, samples: int, episodes: int, clips: int) -> Inspected:
    """Read `episodes` of each source, film `clips` of them, and show `samples` of the run's."""
    few, rest = mixture.datasets[:MOST_SOURCES], mixture.datasets[MOST_SOURCES:]
    stats, why = read_statistics(settings, mixture)
    tape = mixture.tape(settings.trainer.global_batch_size)
    method = mixture.settings.normalization
    normalised_by = f"{method}, statistics of the rows that were read: {why}" if why else f"{method}, as in training"
    seen: list[NDArray[np.uint8]] | str
    try:
        seen = blocks(mixture, settings.trainer.global_batch_size, samples)
    except UserError as error:  # data without cameras, or whose first samples can't be read
        seen = f"{error.what}. {error.remedy}"
    judged: dict[str, Judged] | str
    try:
        judged = lint(few, mixture.groups, min(episodes, JUDGED))
    except UserError as error:
        judged = error.what
    return Inspected(
        title=f"The data of {settings.name}",
        mixture=mixture,
        tape=tape,
        epochs=tape.epoch_of(settings.trainer.steps * tape.batch_size),
        read={d.name: read(d, mixture, stats, episodes) for d in few},
        filmed={d.name: films(d, filmed(d, clips)) for d in few},
        judged=judged,
        samples=seen,
        normalised_by=normalised_by,
        left_out=[d.name for d in rest],
    )
