"""What a mixture's videos say of where lanes should begin."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from opentau_train.data.chunk import chunk_rows, row_step
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.source import VideoSource


def with_keyframes(mixture: Mixture, cache: Path) -> Mixture:
    """The mixture with what its videos' keyframes say of where lanes should begin, read from the files' indices or from
    what an earlier run kept below `cache`. All ranks must see the same. Raises `UserError`."""
    datasets = []
    for d in mixture.datasets:
        known = d.source.keyframes(cache) if isinstance(d.source, VideoSource) else None
        if known is not None:
            reach = chunk_rows(mixture.settings.history + 1, row_step(d.source.fps, d.settings.fps)) - 1
            d = dataclasses.replace(d, train=d.train.entered_at(known.ends, known.frame, reach))
        datasets.append(d)
    return dataclasses.replace(mixture, datasets=tuple(datasets))
