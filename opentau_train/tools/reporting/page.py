"""The report on runs as one HTML page."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from opentau_train.pages.charts import Chart, Charts, most_points, scripts
from opentau_train.pages.document import Html, document, html, joined, paragraph, picture, section, table, tag
from opentau_train.tools.reporting import chunks, curves
from opentau_train.tools.reporting.runs import ABSENT, FLIGHT, LOSS, Run, differences

AXES = {"step": "optimizer step", "hours": "hours of training", "epoch": "epochs"}
MOST_COLUMNS = 8
"""Changed settings that the table of results has columns for; more of them are in the table of differences only."""
MOST_IN_KEY = 2
"""Changed settings that stand beside the runs' names in the key."""
MOST_ROWS = 20
MOST_PICTURE = 4 * 2**20
"""Bytes of a picture that is put into the page."""
NONE = Html("<span class=none>–</span>")
_STYLE = """
.plots:not(.small) { grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.none { color: var(--rule); } th:first-child, td:first-child { min-width: 7rem; }
"""


def page(runs: Sequence[Run], out: Path) -> str:
    """The whole page; `out` is where it will lie, from which its links lead to the runs. Raises `UserError` where
    plotly is missing."""
    ran = scripts()
    made = Charts(_labels(runs), AXES)
    several = len(runs) > 1
    title = f"{len(runs)} runs compared" if several else f"Run {runs[0].name}"
    parts = [
        tag("h1", title),
        paragraph(_purpose(runs)),
        made.key(),
        section("Results", *_results(runs)),
        *_charted(runs, made),
        section("Settings that differ", _differences(runs)) if several else "",
        section("Windows that couldn't be read", *_quarantine(runs)),
        section("Checkpoints and files", _files(runs, out.absolute().parent)),
        made.data(),
    ]
    return document(title, parts, style=_STYLE, scripts=ran)


def _labels(runs: Sequence[Run]) -> list[str]:
    """What each run is called in the key: its name, with what was changed, where that is short."""
    changed = differences(runs) if len(runs) > 1 else {}
    if not 0 < len(changed) <= MOST_IN_KEY:
        return [run.name for run in runs]
    shown = {key.rpartition(".")[2]: [_in_yaml(value) for value in values] for key, values in changed.items()}
    return [f"{run.name} ({', '.join(f'{key}={of[i]}' for key, of in shown.items())})" for i, run in enumerate(runs)]


def _purpose(runs: Sequence[Run]) -> str:
    thinned = max(len(run.rows) for run in runs)
    what = (
        "What the run learned, how fast"
        if len(runs) == 1
        else "What the runs learned, how fast, and what was different"
    )
    return (
        f"{what}, and what is left of it. A name above the charts hides a run and shows it again; a chart is "
        f"enlarged by drawing a rectangle, and as before by a double click. {thinned:,} rows of numbers at most a run; "
        f"a curve of more than {most_points(len(runs)):,} points is drawn by means of neighbours."
    )


def _charted(runs: Sequence[Run], made: Charts) -> list[Html]:
    whole, groups = curves.validation(runs)
    few, left_out = groups[: curves.MOST_GROUPS], len(groups) - curves.MOST_GROUPS
    trained = curves.groups_of_training(runs)
    trained = trained if 1 < len(trained) <= curves.MOST_GROUPS else []
    shown = chunks.charts(runs)
    return [
        section("Held-out losses", _note(_HELD_OUT, whole), made.place(whole), made.place(few), _more(left_out)),
        section("Training losses", made.place(curves.training(runs)), _folded("Of each source", trained, made)),
        section("Optimisation", made.place(curves.optimizer(runs), small=True)),
        section("Speed", made.place(curves.speed(runs), small=True)),
        section("Action errors", _note(_ACTIONS, acted := curves.action_errors(runs)), made.place(acted, small=True)),
        section("Sampled actions", _note(_CHUNKS, shown), made.place(shown, small=True), *_pictures(runs, bool(shown))),
        section("Other measurements", made.place(curves.others(runs)[: curves.MOST_GROUPS], small=True)),
    ]


_HELD_OUT = (
    "Of episodes that weren't trained on. A bar is one standard error up and down, over the episodes: curves nearer to "
    "one another than their bars may differ by chance."
)
_ACTIONS = "Sampled chunks against the recorded ones, in the robot's units, over all steps of the chunk."
_CHUNKS = (
    "Windows of the last validation: recorded in grey, sampled by a run in its colour. All charts of a dimension have "
    "the same scale."
)


def _note(text: str, charts: Sequence[Chart]) -> Html:
    return paragraph(text) if charts else Html()


def _more(left_out: int) -> Html:
    return paragraph(f"{left_out} more are left out; metrics.jsonl has them.") if left_out > 0 else Html()


def _folded(name: str, charts: Sequence[Chart], made: Charts) -> Html:
    return joined([tag("h3", name), made.place(charts, small=True)]) if charts else Html()


def _results(runs: Sequence[Run]) -> list[Html]:
    """A row a run: how far it came, what was changed, what it reached."""
    changed = differences(runs) if len(runs) > 1 else {}
    shown = changed if len(changed) <= MOST_COLUMNS else {}
    ranked = sorted(runs, key=lambda run: (run.lowest() is None, run.lowest() or (0.0, 0)))
    rows = []
    for run in ranked:
        lowest = run.lowest()
        rows.append(
            [
                run.name,
                _steps(run),
                f"{run.hours:.2f} h" + (f", {run.attempts} attempts" if run.attempts > 1 else ""),
                *(_value(values[run.number]) for values in shown.values()),
                *map(_number, (run.last("Training/Loss"), run.last(LOSS), lowest and lowest[0])),
                html(f"{lowest[1]:,}") if lowest else NONE,
                _number(run.median("Training/SamplesPerSecond")),
            ]
        )
    head = ["run", "steps", "time", *shown, "training loss", "held-out loss, last", "lowest", "at step", "samples/s"]
    more = len(changed) - len(shown)
    return [table(head, rows), paragraph(f"{more} settings differ: see below.") if more > 0 else Html()]


def _steps(run: Run) -> str:
    done, asked = max(run.rows), run.settings.get("trainer.steps")
    return f"{done:,} of {asked:,}" if isinstance(asked, int) else f"{done:,}"


def _number(value: float | None) -> object:
    return NONE if value is None else float(f"{value:.6g}")


def _value(value: object) -> Html:
    return NONE if value is ABSENT else html(_in_yaml(value))


def _in_yaml(value: object) -> str:
    """A setting as it stands in YAML, as far as one line goes; a dash where there is none."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "–" if value is ABSENT else "null" if value is None else str(value)


def _differences(runs: Sequence[Run]) -> Html:
    changed = differences(runs)
    if not changed:
        return paragraph("None: the runs have the same settings.")
    rows = [[tag("code", key), *map(_value, values)] for key, values in changed.items()]
    return table(["setting", *(run.name for run in runs)], rows)


def _quarantine(runs: Sequence[Run]) -> list[Html]:
    """How many windows each run replaced, and of which episodes and why."""
    made: list[Html] = []
    for run in runs:
        lines = run.quarantine()
        if lines:
            counted = Counter((str(x.get("dataset")), str(x.get("episode")), str(x.get("cause"))) for x in lines)
            rows = [[*place, num] for place, num in counted.most_common(MOST_ROWS)]
            left = len(counted) - len(rows)
            told = f"{run.name}: {len(lines):,} windows" + (f"; {left} more causes are left out" if left > 0 else "")
            made += [paragraph(told), table(["dataset", "episode", "cause", "windows"], rows)]
    return made


def _files(runs: Sequence[Run], here: Path) -> Html:
    """Where each run's files are, its checkpoints, and the flight record of its steps."""
    rows = []
    for run in runs:
        kept = run.checkpoints()
        listed = ", ".join(f"{name}{' (' + ', '.join(links) + ')' if links else ''}" for name, links in kept)
        files = run.flight_files()
        flight: list[Html] = [NONE]
        if files:
            flight = [_link(run.folder / FLIGHT, here, f"{len(files)} files"), html("; "), tag("code", _why(run))]
        rows.append([_link(run.folder, here, run.name), listed or NONE, joined(flight)])
    return table(["run", "checkpoints", "flight record: the samples of each step"], rows)


def _why(run: Run) -> str:
    """The command that shows the samples of the step with the largest gradient."""
    norms = {
        step: row["Training/GradNorm"] for step, row in run.rows.items() if row.get("Training/GradNorm") is not None
    }
    step = max(norms, key=lambda s: norms[s]) if norms else max(run.rows)
    return f"python -m opentau_train.tools.why {shlex.quote(str(run.folder))} --step {step}"


def _link(target: Path, here: Path, text: str) -> Html:
    return tag("a", text, href=quote(os.path.relpath(target, here) + "/"))


def _pictures(runs: Sequence[Run], drawn: bool) -> list[Html]:
    """The pictures of chunks of runs whose numbers weren't kept."""
    made: list[Html] = []
    for run in runs:
        path = chunks.newest(run, ".png")
        if path is not None and not drawn and path.stat().st_size <= MOST_PICTURE:
            text = f"{run.name}: recorded (black) and sampled (red) actions, {path.stem}"
            made += [paragraph(text), picture(path.read_bytes(), "png", text)]
    return made
