"""A recording as one HTML page: a table of errors and plots, drawn as SVG; it loads nothing and runs nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opentau_train.deploy.openloop.recording import Recording
from opentau_train.pages.document import Html, document, facts, joined, paragraph, section, table, tag
from opentau_train.pages.drawing import Line, plot

MAX_EPISODES = 12
"""Episodes that are drawn; errors are of all."""

_STYLE = "th:not(:first-child), td:not(:first-child) { text-align: right; padding-left: .8rem; }"


def page(recording: Recording) -> str:
    """The whole page."""
    about = recording.about
    episodes = list(dict.fromkeys(recording.episode.tolist()))
    shown = episodes[:MAX_EPISODES]
    left_out = f"; the first {MAX_EPISODES} of {len(episodes)} are drawn" if len(episodes) > MAX_EPISODES else ""
    title = f"Open-loop check of {about['policy']}"
    parts = [
        tag("h1", title),
        paragraph(
            "Each observation is the dataset's, whatever the policy predicted before: nothing is executed. A large "
            "error shows that something is wrong; a small one isn't success, which takes a robot or a simulator."
        ),
        _facts(recording, len(episodes)),
        section(
            "Mean absolute error",
            paragraph(
                "In the robot's units. ",
                tag("em", "Spread"),
                " is the standard deviation of the recorded actions: the error of who knows nothing but their mean is "
                "of that size.",
            ),
            _table(recording),
        ),
        section("Error over the chunk", _plots([_over_the_chunk(recording, d) for d in range(len(_names(recording)))])),
        section(
            "Episodes",
            paragraph(
                *(_key("recorded"), "recorded", _key("predicted"), f"predicted; a dot begins a chunk{left_out}"),
            ),
        ),
        *(section(f"Episode {episode}", _episode(recording, episode)) for episode in shown),
    ]
    return document(title, parts, style=_STYLE)


def _key(kind: str) -> Html:
    return tag("span", class_="key", style=f"background:var(--{kind})")


def _plots(plots: list[Html]) -> Html:
    return tag("div", joined(plots), class_="plots")


def _names(recording: Recording) -> list[str]:
    """[A'] each dimension's name, with its unit where that is declared."""
    about = recording.about
    pairs = zip(about["action_names"], about["units"], strict=True)
    return [f"{name} ({unit})" if unit else name for name, unit in pairs]


def _facts(recording: Recording, num_episodes: int) -> Html:
    about, chunk, waits = recording.about, recording.predicted.shape[1], recording.milliseconds
    known = {
        "dataset": about["dataset"],
        "robot": about["norm_head"],
        "windows": f"{len(recording)} of {num_episodes} episodes",
        "chunk": f"{chunk} steps at {about['fps']:g} a second, {chunk / about['fps']:.2g} s",
        "seed": about["seed"],
        "wait for a chunk": f"{np.median(waits):.0f} ms, the median; {waits.max():.0f} ms the longest",
    }
    return facts(known)


def _table(recording: Recording) -> Html:
    spread, of_steps = recording.spread, recording.mae_of_steps
    columns = recording.mae, of_steps[0], of_steps[-1], spread
    units = [unit or "not declared" for unit in recording.about["units"]]
    rows = []
    for d, name in enumerate(recording.about["action_names"]):
        numbers = [f"{column[d]:.4g}" for column in columns]
        numbers.append(f"{recording.mae[d] / spread[d]:.2f}" if spread[d] > 0 else "constant")
        rows.append((name, units[d], *numbers))
    return table(("dimension", "unit", "MAE", "of the first step", "of the last", "spread", "MAE / spread"), rows)


def _over_the_chunk(recording: Recording, d: int) -> Html:
    errors = recording.mae_of_steps[:, d]
    seconds = np.arange(len(errors)) / recording.about["fps"]
    return plot([Line("predicted", seconds, errors)], "time in the chunk (s)", f"MAE: {_names(recording)[d]}", 0.0)


def _episode(recording: Recording, episode: int) -> Html:
    rows = np.flatnonzero(recording.episode == episode)
    plots = []
    for d, name in enumerate(_names(recording)):
        lines = [Line("recorded", *_recorded(recording, rows, d))]
        for row in rows.tolist():
            seconds, there = _seconds(recording, row), ~recording.is_pad[row]
            lines.append(Line("predicted", seconds[there], recording.predicted[row, there, d], dot=True))
        plots.append(plot(lines, f"time in episode {episode} (s)", name))
    return _plots(plots)


def _seconds(recording: Recording, row: int) -> NDArray[np.float64]:
    """[T] the times of a chunk's steps in the episode."""
    return recording.second[row] + np.arange(recording.predicted.shape[1]) / recording.about["fps"]


def _recorded(recording: Recording, rows: NDArray[np.int64], d: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What is known of a dimension in an episode, each time once; NaN stands where nothing is known between."""
    there = ~recording.is_pad[rows]
    seconds = np.concatenate([_seconds(recording, row)[t] for row, t in zip(rows.tolist(), there, strict=True)])
    values = recording.recorded[rows][there][:, d].astype(np.float64)
    _, first = np.unique(seconds.round(6), return_index=True)
    seconds, values = seconds[first], values[first]
    gaps = np.flatnonzero(np.diff(seconds) > 1.5 / recording.about["fps"]) + 1
    return np.insert(seconds, gaps, np.nan), np.insert(values, gaps, np.nan)
