"""Sampled chunks of actions beside the recorded ones, as validation's evaluator `action` keeps them in plots/."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentau_train import strangers
from opentau_train.pages.charts import RECORDED, Chart, Curve
from opentau_train.tools.reporting.runs import Run

PATTERN = "actions_????????"
"""The files of plots/, whose names end in the step."""
MOST = 48
"""Charts at most."""
X_TITLE = "step of the chunk"


def newest(run: Run, suffix: str) -> Path | None:
    """The run's last file of chunks with this suffix."""
    return max((run.folder / "plots").glob(PATTERN + suffix), default=None)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each window and dimension, of the last validation of each run: recorded in grey, sampled in the run's
    colour. Charts of one dimension have one scale, and so the windows can be compared."""
    panels: dict[tuple[str, str], list[Curve]] = {}
    for run in runs:
        for place, name, true, sampled in _panels(newest(run, ".json")):
            curves = panels.setdefault((place, name), [])
            if not curves:
                curves.append(_curve(RECORDED, true))
            curves.append(_curve(run.number, sampled))
    chosen = dict(list(panels.items())[:MOST])
    scale = {name: _scale(curves for (_, other), curves in chosen.items() if other == name) for _, name in chosen}
    return [
        Chart(
            f"{_dimension(name)}, {place}", _unit(name), tuple(curves), X_TITLE, low=scale[name][0], high=scale[name][1]
        )
        for (place, name), curves in chosen.items()
    ]


def _panels(path: Path | None) -> list[tuple[str, str, list[Any], list[Any]]]:
    """(window, dimension, recorded [N], sampled [T]) of a file; none of a file that isn't one of chunks."""
    if path is None:
        return []
    try:
        tree = strangers.read_json(path)
        return [(str(p["place"]), str(p["name"]), list(p["true"]), list(p["predicted"])) for p in tree]
    except (*strangers.MALFORMED,):
        return []


def _curve(series: int, values: Sequence[Any]) -> Curve:
    numbers = [float(v) if isinstance(v, (int, float)) and math.isfinite(v) else None for v in values]
    return Curve(series, {"own": [float(i) for i in range(len(numbers))]}, numbers)


def _scale(panels: Any) -> tuple[float, float]:
    """From the lowest to the highest value of all, with some room around them."""
    values = [value for curves in panels for curve in curves for value in curve.y if value is not None] or [0.0]
    room = 0.06 * (max(values) - min(values)) or 0.1 * (abs(max(values)) or 1.0)
    return min(values) - room, max(values) + room


def _dimension(name: str) -> str:
    return name.rpartition(" [")[0] or name


def _unit(name: str) -> str:
    unit = name.rpartition(" [")[2].rstrip("]") if " [" in name else ""
    return unit.replace("_s", "/s") if unit not in ("", "-") else "the dataset's units"
