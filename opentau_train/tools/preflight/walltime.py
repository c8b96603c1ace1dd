"""How long the steps take, beside how long the job has."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from opentau_train.config.settings import Settings
from opentau_train.errors import UserError
from opentau_train.sinks.jsonl import read_rows
from opentau_train.tools.preflight.lines import Line

SAME = ("data", "model", "trainer", "optimizer", "parallelism", "finetune", "validation", "checkpoint")
"""Sections of the configuration on which the time of a step, or of a run, depends."""
OTHER = {("trainer", "steps"), ("trainer", "stop_after")}
"""Keys of these that it doesn't depend on."""


def walltime(settings: Settings, tree: Mapping[str, Any], rate: float | None, limit: float | None) -> list[Line]:
    """The time of the steps, at `rate` steps a second (None: that of an earlier run), against `limit` seconds (None:
    what is left of SLURM's job, if this is one)."""
    by = "--rate"
    if rate is None:
        measured = measured_rate(settings, tree)
        if measured is None:
            text = "no rate is known: give --rate STEPS_PER_SECOND, or make a short run of this configuration first"
            return [Line("walltime", "ok", text)]
        run, rate = measured
        by = f"as in {run}, validations and saves included"
    if limit is None and (end := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():
        limit = int(end) - time.time()
    seconds = settings.trainer.steps / rate
    text = f"{settings.trainer.steps} steps at {rate:.3g} a second ({by}) take {duration(seconds)}"
    if limit is None:
        return [Line("walltime", "ok", f"{text}; --walltime D-HH:MM:SS compares")]
    text += f", the job has {duration(limit)}"
    if seconds <= limit:
        return [Line("walltime", "ok", text)]
    remedy = (
        f"go on in further jobs with resume=auto and paths.run_dir, or set trainer.steps={max(1, int(limit * rate))}"
    )
    return [Line("walltime", "warning", text, "trainer.steps", remedy)]


def measured_rate(settings: Settings, tree: Mapping[str, Any]) -> tuple[Path, float] | None:
    """(run, its steps a second, the first logged ones left out) of the newest run of this configuration."""
    root = Path(settings.paths.root).expanduser()
    named = [Path(settings.paths.run_dir).expanduser()] if settings.paths.run_dir else []
    runs = [*named, *root.glob(f"{settings.name}-*")]
    files = [run / "metrics.jsonl" for run in runs if (run / "metrics.jsonl").is_file()]
    for file in sorted(files, key=lambda path: -path.stat().st_mtime):
        if _relevant(_tree_of(file.parent)) == _relevant(tree) and (rate := _rate(file.parent)) is not None:
            return file.parent, rate
    return None


def _rate(run: Path) -> float | None:
    """Steps a second between the rows of the run's last attempt; None where there are too few of them."""
    try:
        rows = list(read_rows(run).values())
    except (OSError, UserError):
        return None
    last = [row for row in rows if row.get("attempt", 0) == rows[-1].get("attempt", 0) and "Timing/Step" in row]
    if len(last) < 3:
        return None
    seconds, steps = last[-1]["time"] - last[1]["time"], last[-1]["step"] - last[1]["step"]
    typical = statistics.median(row["Timing/Step"] for row in last[1:])
    return steps / max(seconds, typical * steps) if seconds > 0 else None


def _tree_of(run: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load((run / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _relevant(tree: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: tree.get(name) for name in SAME}
    return {
        name: {k: v for k, v in section.items() if (name, k) not in OTHER} if isinstance(section, Mapping) else section
        for name, section in sections.items()
    }


def duration(seconds: float) -> str:
    """As people say it."""
    minutes = max(0.0, seconds) / 60
    if minutes < 1:
        return f"{max(0.0, seconds):.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def seconds_of(text: str) -> float:
    """The seconds of a walltime as SLURM writes it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. Raises
    ValueError."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if len(parts) > 3 or min(parts) < 0 or (dash and not days):
        raise ValueError(text)
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return float(int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds)
