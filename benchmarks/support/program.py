"""The program's own mixture and settings for a benchmark, and what the operating system says of its processes."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opentau_train import cli
from opentau_train.config.settings import Settings, load_settings
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.open import open_mixture
from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.source import whole_episodes


def settings_of(arguments: Sequence[str]) -> Settings:
    """The settings of a command line."""
    return load_settings(cli.compose(arguments))


def mixture_of(root: Path | str, *arguments: str, cache: Path | None = None) -> Mixture:
    """The mixture of one LeRobot dataset; `cache` lies beside it where it isn't given."""
    cache = Path(root).parent / "cache" if cache is None else cache
    given = ["+recipe=lerobot", f"data.sources.main.root={root}", "data.sources.main.val_split_ratio=0.0"]
    return open_mixture(settings_of([*given, f"paths.cache_dir={cache}", *arguments]))


def unique_bytes(pid: int) -> int:
    """Memory that only this process has (USS): what would be free if it ended."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))


def turns(text: str) -> tuple[int, bool]:
    """(how many interleaved turns, whether it is only to be seen that the script runs) of a command line, `text` being
    the script's own."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one turn, to see that it runs")
    options = parser.parse_args()
    return 1 if options.quick else options.repeats, options.quick


def machine() -> str:
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, no accelerator, load {load:.1f}"


def with_episodes(mixture: Mixture, num: int) -> Mixture:
    """The mixture as if its one dataset had `num` episodes: its own, again and again."""
    (dataset,) = mixture.datasets
    place = np.arange(num) % len(dataset.source.episodes)
    stored = dataset.source.reading.stored.select(place)
    length = stored.table.length
    reading = dataclasses.replace(dataset.source.reading, stored=stored)
    source = dataclasses.replace(dataset.source, reading=reading, blocks=whole_episodes(length))
    position = np.arange(num, dtype=np.int32)
    blocks = DatasetBlocks(dataset.name, position, np.zeros(num, np.int32), length, position.astype(np.int64))
    changed = dataclasses.replace(
        dataset,
        source=source,
        train=blocks,
        held_out=np.zeros(num, bool),
        group_of=np.zeros(num, np.int64),
    )
    return dataclasses.replace(mixture, datasets=(changed,), draws=(blocks.num_windows,))
