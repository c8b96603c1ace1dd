"""The program's own mixture and settings for a benchmark, and what the operating system says of its processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from opentau_train import cli, config
from opentau_train.config import Settings
from opentau_train.data.assemble import open_mixture
from opentau_train.data.mixture import Mixture
from opentau_train.distributed import launch


def settings_of(arguments: Sequence[str]) -> Settings:
    """The settings of a command line."""
    return config.load(cli.compose(arguments))


def mixture_of(root: Path, *arguments: str) -> Mixture:
    """The mixture of one LeRobot dataset."""
    given = ["+recipe=lerobot", f"data.sources.main.root={root}", "data.sources.main.val_split_ratio=0.0"]
    return open_settings(settings_of([*given, f"paths.cache_dir={root.parent / 'cache'}", *arguments]))


def open_settings(settings: Settings) -> Mixture:
    with launch(device="cpu", precision="no", timeout=60.0, identity={}) as world:
        return open_mixture(settings, world)


def unique_bytes(pid: int) -> int:
    """Memory that only this process has (USS): what would be free if it ended."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))


def machine() -> str:
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, no accelerator, load {load:.1f}"
