"""A recording as one HTML page: a table of errors and plots, drawn as SVG; it loads nothing and runs nothing."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from opentau_train.deploy.openloop.plot import Line, plot
from opentau_train.deploy.openloop.recording import Recording

MAX_EPISODES = 12
"""Episodes that are drawn; errors are of all."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5f6670; --rule: #d8dce1; --ground: #ffffff;
  --recorded: #8a929c; --predicted: #1766c2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a7b0; --rule: #3a4048; --ground: #15181c;
  --recorded: #8d96a1; --predicted: #6fb1ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, dt, figcaption { color: var(--soft); } dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dd { margin: 0; overflow-wrap: anywhere; } .wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; } td { font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; } svg .rule { stroke: var(--rule); stroke-width: 1; }
svg .recorded { stroke: var(--recorded); stroke-width: 3; fill: none; }
svg .predicted { stroke: var(--predicted); stroke-width: 1.5; fill: none; } svg circle { fill: var(--predicted); }
.key { display: inline-block; width: 1.6em; height: .25em; vertical-align: middle; margin: 0 .3em 0 1em; }
"""


def page(recording: Recording) -> str:
    """The whole page."""
    about = recording.about
    episodes = list(dict.fromkeys(recording.episode.tolist()))
    shown = episodes[:MAX_EPISODES]
    left_out = f"; the first {MAX_EPISODES} of {len(episodes)} are drawn" if len(episodes) > MAX_EPISODES else ""
    parts = [
        f"<h1>Open-loop check of {escape(str(about['policy']))}</h1>",
        "<p>Each observation is the dataset's, whatever the policy predicted before: nothing is executed. A large "
        "error shows that something is wrong; a small one isn't success, which takes a robot or a simulator.</p>",
        _facts(recording, len(episodes)),
        "<h2>Mean absolute error</h2>",
        "<p>In the robot's units. <em>Spread</em> is the standard deviation of the recorded actions: the error of "
        "who knows nothing but their mean is of that size.</p>",
        f"<div class=wide>{_table(recording)}</div>",
        "<h2>Error over the chunk</h2>",
        f"<div class=plots>{''.join(_over_the_chunk(recording, d) for d in range(len(_names(recording))))}</div>",
        f"<h2>Episodes</h2><p><span class=key style='background:var(--recorded)'></span>recorded"
        f"<span class=key style='background:var(--predicted)'></span>predicted; a dot begins a chunk{left_out}</p>",
        *(_episode(recording, episode) for episode in shown),
    ]
    title = escape(f"Open-loop check of {about['policy']}")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _names(recording: Recording) -> list[str]:
    """[A'] each dimension's name, with its unit where that is declared."""
    about = recording.about
    pairs = zip(about["action_names"], about["units"], strict=True)
    return [f"{name} ({unit})" if unit else name for name, unit in pairs]


def _facts(recording: Recording, num_episodes: int) -> str:
    about, chunk, waits = recording.about, recording.predicted.shape[1], recording.milliseconds
    facts = {
        "dataset": about["dataset"],
        "robot": about["norm_head"],
        "windows": f"{len(recording)} of {num_episodes} episodes",
        "chunk": f"{chunk} steps at {about['fps']:g} a second, {chunk / about['fps']:.2g} s",
        "seed": about["seed"],
        "wait for a chunk": f"{np.median(waits):.0f} ms, the median; {waits.max():.0f} ms the longest",
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{escape(str(value))}</dd>' for name, value in facts.items())}</dl>"


def _table(recording: Recording) -> str:
    spread, of_steps = recording.spread, recording.mae_of_steps
    columns = recording.mae, of_steps[0], of_steps[-1], spread
    units = [unit or "not declared" for unit in recording.about["units"]]
    rows = []
    for d, name in enumerate(recording.about["action_names"]):
        numbers = [f"{column[d]:.4g}" for column in columns]
        numbers.append(f"{recording.mae[d] / spread[d]:.2f}" if spread[d] > 0 else "constant")
        rows.append(f"<tr><td>{escape(name)}</td><td>{escape(units[d])}</td><td>{'</td><td>'.join(numbers)}</td></tr>")
    head = ("dimension", "unit", "MAE", "of the first step", "of the last", "spread", "MAE / spread")
    return f"<table><tr><th>{'</th><th>'.join(head)}</th></tr>{''.join(rows)}</table>"


def _over_the_chunk(recording: Recording, d: int) -> str:
    errors = recording.mae_of_steps[:, d]
    seconds = np.arange(len(errors)) / recording.about["fps"]
    return plot([Line("predicted", seconds, errors)], "time in the chunk (s)", f"MAE: {_names(recording)[d]}", 0.0)


def _episode(recording: Recording, episode: int) -> str:
    rows = np.flatnonzero(recording.episode == episode)
    plots = []
    for d, name in enumerate(_names(recording)):
        lines = [Line("recorded", *_recorded(recording, rows, d))]
        for row in rows.tolist():
            seconds, there = _seconds(recording, row), ~recording.is_pad[row]
            lines.append(Line("predicted", seconds[there], recording.predicted[row, there, d], dot=True))
        plots.append(plot(lines, f"time in episode {episode} (s)", name))
    return f"<h2>Episode {episode}</h2><div class=plots>{''.join(plots)}</div>"


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
