"""The README.md of a policy that is published: what it is, what it was trained on, how good it is, how to run it.

Markdown with the Hub's YAML head (https://huggingface.co/docs/hub/model-cards). All of it comes from the checkpoint and
the run's own numbers; names that datasets give are escaped, for a card is shown to others.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from opentau_train import strangers
from opentau_train.checkpoints.card import Pretrained
from opentau_train.checkpoints.contents import RUN
from opentau_train.deploy.policy import RobotPolicy
from opentau_train.deploy.robots import Robot
from opentau_train.sinks.jsonl import ABOUT, read_rows
from opentau_train.sinks.table import read_scores

SHOWN = 40
"""Rows of a table that are written out; the rest is counted."""


def model_card(repo: str, checkpoint: Path, weights: str, card: Pretrained, policy: RobotPolicy, licence: str) -> str:
    """The README.md of `policy`, which has the `weights` (model or ema) of `checkpoint`, a whole one in its run's
    directory, to be published as `repo` (OWNER/NAME). Raises OSError."""
    counted = strangers.read_mapping(checkpoint / RUN)
    step, run = int(counted["step"]), checkpoint.parent.parent
    parts = [
        f"# {escaped(repo.rpartition('/')[2])}",
        _what(card, step, weights),
        "## Use\n\n" + _use(repo, policy),
        "## What it reads and gives\n\n" + _robots(policy),
        "## Data\n\n" + _data(card, counted["stream"]["sources"]),
        "## Held-out losses\n\n" + _losses(run, step),
        "## Licence\n\n"
        + (f"`{licence}`." if licence else "None was stated; ask whoever published it.")
        + " The datasets have licences of their own.",
    ]
    return _head(card, licence) + "\n\n".join(parts) + "\n"


def escaped(text: object) -> str:
    """One line of text, as Markdown shows it and without markup of its own."""
    line = re.sub(r"\s+", " ", str(text)).strip()
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", line)


def _head(card: Pretrained, licence: str) -> str:
    repos = {s.get("repo_id") for s in card.config["data"]["sources"].values() if isinstance(s, Mapping)}
    head: dict[str, Any] = {"license": licence} if licence else {}
    head |= {"library_name": "opentau_train", "pipeline_tag": "robotics", "tags": ["robotics", "opentau_train"]}
    head |= {"datasets": sorted(str(r) for r in repos if r)} if any(repos) else {}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"


def _what(card: Pretrained, step: int, weights: str) -> str:
    kind = str(card.config["model"].get("_target_", "")).rpartition(".")[2]
    which = "the moving average of the weights" if weights == "ema" else "the trained weights"
    return (
        f"A robot policy (`{escaped(kind)}`) trained with opentau_train: {which} after {step:,} optimizer steps of "
        f"{card.config['trainer']['global_batch_size']} samples, seed {card.config['seed']}."
    )


def _use(repo: str, policy: RobotPolicy) -> str:
    head = f', norm_head="{next(iter(policy.robots))}"' if len(policy.robots) > 1 else ""
    robot = next(iter(policy.robots.values()))
    pictures = ", ".join(f'"{camera}": picture' for camera in robot.cameras)
    inputs = ", ".join(filter(None, [pictures, '"state": state, "task": "what to do"']))
    lines = ["from opentau_train import load_policy", "", f'policy = load_policy("{repo}"{head})']
    lines.append(f"actions = policy.act({{{inputs}}})  # [{robot.chunk_length}, {len(robot.action_names)}]")
    return "```python\n" + "\n".join(lines) + "\n```"


def _robots(policy: RobotPolicy) -> str:
    rows = [
        (name, ", ".join(r.cameras), len(r.state_names), len(r.action_names), f"{r.fps:g}", _convention(r))
        for name, r in policy.robots.items()
    ]
    head = ("robot::control mode", "cameras", "state dimensions", "action dimensions", "actions a second", "convention")
    return table(head, rows)


def _convention(robot: Robot) -> str:
    tree = {
        vector: dataclasses.asdict(getattr(robot.convention, vector))
        for vector in ("state", "actions")
        if getattr(robot.convention, vector) is not None
    }
    said = {vector: {k: v for k, v in about.items() if v not in (None, (), {})} for vector, about in tree.items()}
    return (
        yaml.safe_dump(json.loads(json.dumps(said)), default_flow_style=True, width=10_000) if said else "not declared"
    )


def _data(card: Pretrained, order: Mapping[str, Any]) -> str:
    held_out, total = card.policy["held_out"], sum(int(source["draws"]) for source in order.values())
    rows = [
        (
            name,
            source.get("repo_id") or "one of its owner's",
            f"{int(order[name]['draws']) / total:.1%}" if name in order else "",
            held_out.get(name) or "none",
        )
        for name, source in card.config["data"]["sources"].items()
    ]
    said = table(("source", "dataset", "share of the samples", "episodes that were held out"), rows)
    kind = card.policy["normalization"]
    return f"{said}\n\nState and actions are normalised by `{kind}`, for each robot and control mode by itself."


def _losses(run: Path, step: int) -> str:
    try:
        found = {
            n: row for n, row in read_rows(run).items() if n <= step and any(t.startswith("Validation/") for t in row)
        }
    except OSError:
        found = {}
    if not found:
        return "None were measured."
    last = max(found)
    scores = read_scores({t: v for t, v in found[last].items() if t not in ABOUT and v is not None})
    rows = [
        (
            s.group or "all, by weight",
            s.term,
            f"{s.value:.5g}",
            f"{s.stderr:.2g}" if s.stderr is not None else "",
            f"{s.num:.0f}" if s.num is not None else "",
        )
        for s in scores
    ]
    head = ("dataset/control mode", "loss", "mean", "standard error", "windows")
    return f"After step {last:,}, on episodes that training never read.\n\n" + table(head, rows)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of the first `SHOWN` rows."""
    rows = list(rows)
    lines = [head, ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows[:SHOWN])]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return text if len(rows) <= SHOWN else f"{text}\n\nand {len(rows) - SHOWN} more."
