"""The charts of a report: what each of the runs' numbers is drawn as."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from opentau_train.pages.charts import Chart, Curve
from opentau_train.sinks.table import NORM_HEAD
from opentau_train.tools.reporting.runs import LOSS, Run

MOST_GROUPS = 24
"""Charts of one kind; a mixture of more groups is for TensorBoard's filters."""
UNITS = {"MSE": "MSE, normalised", "CE": "cross-entropy (nats)", "Loss": "loss"}
ERROR_UNITS = {
    "rad": "rad",
    "m": "m",
    "rad_s": "rad/s",
    "m_s": "m/s",
    "deg": "degrees",
    "mm": "mm",
    "gripper": "gripper",
}
_TERM = re.compile(r"Training/([A-Z][A-Z_0-9]*)")
_VALIDATION = re.compile(r"(Validation|Validation-(?!Action|Video|LeftOut)[\w-]+)/(?:(.+)/)?([A-Z][A-Z_0-9]*|Loss)")
_ACTION = re.compile(r"Validation-Action/(.+)/(MAE(?:_\w+)?|Agreement)")


def training(runs: Sequence[Run]) -> list[Chart]:
    """The losses of training, one chart a term: of the whole mixture."""
    terms = [match[1] for tag in _tags(runs) if (match := _TERM.fullmatch(tag))]
    terms = (["Loss"] if len(terms) != 1 else []) + terms
    return [
        chart
        for term in terms
        for chart in _chart(runs, f"Training/{term}", f"Training {_in_words(term)}", _unit(term), log=True, smooth=True)
    ]


def groups_of_training(runs: Sequence[Run]) -> list[Chart]:
    """The same losses of each (dataset, control mode)."""
    made: list[Chart] = []
    for tag in _tags(runs):
        head, _, term = tag.removeprefix("Training/").rpartition("/")
        if tag.startswith("Training/") and head and term == term.upper():
            made += _chart(runs, tag, f"{head}: {term}", _unit(term), log=True, smooth=True)
    return made


def optimizer(runs: Sequence[Run]) -> list[Chart]:
    """What says whether the optimisation is sound."""
    made = [
        *_chart(runs, "Training/GradNorm", "Gradient norm before clipping", "norm", log=True, smooth=True),
        *_chart(runs, "Training/LearningRate", "Learning rate", "learning rate", low=0.0),
    ]
    for tag, title in (
        ("SkippedSteps", "Steps skipped: gradients not finite"),
        ("SubstitutedWindows", "Windows replaced"),
    ):
        if any(run.last(f"Training/{tag}") for run in runs):
            made += _chart(runs, f"Training/{tag}", title, "since the run began", low=0.0)
    return made


def speed(runs: Sequence[Run]) -> list[Chart]:
    """What a step costs."""
    waits = tuple(filter(None, (_wait(run) for run in runs)))
    return [
        *_chart(runs, "Training/SamplesPerSecond", "Throughput", "samples/s", low=0.0),
        *_chart(runs, "Training/TokensPerSecond", "Throughput in tokens", "tokens/s", low=0.0),
        *([Chart("Wait for data, share of a step", "%", waits, low=0.0)] if waits else []),
        *_chart(runs, "Timing/Step", "Time of a step", "s", low=0.0),
        *_chart(runs, "Timing/MFU", "Model FLOPs utilisation", "share of the device's peak", low=0.0),
        *_chart(runs, "Memory/DeviceAllocatedPeak", "Peak memory of the device", "MiB", low=0.0),
        *_chart(runs, "Memory/HostRSS", "Memory of rank 0 on the host", "MiB", low=0.0),
    ]


def _wait(run: Run) -> Curve | None:
    wait, step = run.curve("Timing/DataWait", scale=100.0), run.curve("Timing/Step")
    if wait is None or step is None or len(wait.y) != len(step.y):
        return None
    shares = [a / b if a is not None and b else None for a, b in zip(wait.y, step.y, strict=True)]
    return Curve(run.number, wait.x, shares)


def validation(runs: Sequence[Run]) -> tuple[list[Chart], list[Chart]]:
    """The held-out losses: (of the whole mixture, of each group with error bars), a chart for each term."""
    whole: list[Chart] = []
    groups: list[Chart] = []
    for tag in _tags(runs):
        match = _VALIDATION.fullmatch(tag)
        if match is None or match[3] == "N" or (match[2] and NORM_HEAD in match[2]):
            continue
        prefix, group, term = match.groups()
        of = "Held-out" if prefix == "Validation" else f"{prefix}:"
        if group:
            groups += _chart(runs, tag, f"{of} {term}, {group}", _unit(term), log=True, points=True)
        else:
            chart = list(_chart(runs, tag, f"{of} {_in_words(term)}", _unit(term), log=True, points=True))
            whole = chart + whole if tag == LOSS else whole + chart
    return whole, groups


def action_errors(runs: Sequence[Run]) -> list[Chart]:
    """The errors of sampled actions in the robot's units, and the agreement of grippers, of each group; those of single
    dimensions stand in metrics.jsonl."""
    made: list[Chart] = []
    for tag in _tags(runs):
        match = _ACTION.fullmatch(tag)
        if match is None:
            continue
        group, kind = match.groups()
        if kind == "Agreement":
            made += _chart(
                runs, tag, f"Gripper on the right side, {group}", "share of steps", points=True, low=0.0, high=1.0
            )
        elif any(f"{tag}/First" in run.tags for run in runs):  # of a whole group: those of a dimension have no such
            unit = kind.partition("_")[2]
            unit = ERROR_UNITS.get(unit, unit or "the dataset's units")
            made += _chart(runs, tag, f"Mean absolute error in {unit}, {group}", unit, points=True, low=0.0)
    return made


def others(runs: Sequence[Run]) -> list[Chart]:
    """What further evaluators wrote: success rates, errors of future frames."""
    known = ("Training", "Validation", "Validation-Action", "Timing", "Memory")
    made: list[Chart] = []
    for tag in _tags(runs):
        prefix, _, rest = tag.partition("/")
        told = tag.endswith(("/N", "/StdErr")) or _VALIDATION.fullmatch(tag)
        if prefix not in known and rest and not told:
            made += _chart(runs, tag, tag, rest.rpartition("/")[2], points=True)
    return made


def _tags(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(tag for run in runs for tag in run.tags))


def _chart(
    runs: Sequence[Run],
    tag: str,
    title: str,
    unit: str,
    *,
    log: bool = False,
    smooth: bool = False,
    points: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Iterator[Chart]:
    """A chart of one tag with a curve for each run that has it; none where no run has."""
    curves = tuple(curve for run in runs if (curve := run.curve(tag)) is not None)
    if curves:
        yield Chart(title, unit, curves, log=log, smooth=smooth, points=points, low=low, high=high)


def _unit(term: str) -> str:
    return UNITS.get(term, term)


def _in_words(term: str) -> str:
    return "loss" if term == "Loss" else term
