"""The files of sources on servers, fetched ahead of the lanes that will read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.windows import Windows
from opentau_train.data.remote.ahead import fetch_ahead
from opentau_train.data.remote.mirror import Mirror, mirror_at
from opentau_train.data.source import FileSource

STEPS_AHEAD = 64
"""Batches between the request for an episode's files and the episode's first window."""


def files_fetched(mixture: Mixture, plan: Iterator[Windows]) -> Iterator[Windows]:
    """`plan`, what a worker reads, as it is. Where a lane comes to an episode whose files are on a server, they are
    being fetched by then. Nothing is done for files that lie here."""
    remote: dict[int, tuple[Mirror, FileSource]] = {}
    for dataset in mixture.datasets:
        root, source = dataset.settings.root, dataset.source
        if root is not None and isinstance(source, FileSource) and (mirror := mirror_at(Path(root))):
            remote[dataset.index] = mirror, source
    if not remote:
        return plan
    lanes: dict[int, tuple[int, int]] = {}  # what each one reads: (dataset, episode)

    def wanted(windows: Windows) -> Iterator[tuple[Mirror, Path]]:
        for lane, dataset, episode in zip(windows.slot.tolist(), windows.dataset.tolist(), windows.episode.tolist()):
            if lanes.get(lane) != (dataset, episode) and dataset in remote:
                mirror, source = remote[dataset]
                yield from ((mirror, path) for path in source.files(episode))
            lanes[lane] = dataset, episode

    return fetch_ahead(plan, wanted, STEPS_AHEAD)
