"""What a run is about to do, told before its first step in lines of at most 80 columns, and at its end what it left."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentau_train.config.settings import Settings
from opentau_train.config.typed import TARGET
from opentau_train.config.weights import PATHS

WIDTH = 80
SMALL = 50_000_000
"""Parameters: a policy of fewer is a small one."""
PUBLISHED = ("act", "diffusion", "pi0", "pi05")
"""Options of the group `model` for which there are published weights."""


@dataclass(frozen=True)
class Facts:
    """What the summary is of. `device`, `numbers` and `memory` of a rank, and `trains`, what of the policy does, are in
    words; `num_windows`: those of an epoch; `encoders`: options of the policy that name weights of a part of it."""

    settings: Settings
    run_dir: Path
    device: str
    numbers: str
    trains: str
    memory: str
    num_parameters: int
    num_ranks: int
    max_samples: int
    num_windows: int
    encoders: tuple[str, ...] = ()


def start_summary(facts: Facts) -> str:
    """A line a fact: its name, then what it is. A line that would be longer than `WIDTH` goes on below, indented; a
    path is never broken."""
    settings = facts.settings
    told = {
        "run": shown(facts.run_dir),
        "policy": _policy(settings.model, facts),
        "parameters": facts.trains,
        "device": f"{facts.device}, {facts.numbers}",
        "batch": _batch(settings, facts.num_ranks, facts.max_samples),
        "steps": _steps(settings, facts.num_windows),
        "rate": _rate(settings),
        "memory": facts.memory,
        "look at": _to_open(settings.logger, facts.run_dir),
    }
    indent = max(map(len, told)) + 2
    lines = [_wrapped(name.ljust(indent), text) for name, text in told.items()]
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> str:
    if " " not in text:  # a path: longer than the line, it would leave its name alone there
        return label + text
    return textwrap.fill(
        label + text, WIDTH, subsequent_indent=" " * len(label), break_long_words=False, break_on_hyphens=False
    )


def shown(path: Path) -> str:
    """A path as short as it works from the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _policy(model: Mapping[str, Any], facts: Facts) -> str:
    name = str(model.get(TARGET, "")).rpartition(".")[2]
    given = [f"{key}={model[key]}" for key in (*PATHS, *facts.encoders) if model.get(key)]
    if given:
        return f"{name}, its first weights from {', '.join(given)}"
    size = "a small one trained" if facts.num_parameters < SMALL else "trained"
    return f"{name}, {size} from scratch (model={', '.join(PUBLISHED)} can begin with published weights)"


def _batch(settings: Settings, ranks: int, max_samples: int) -> str:
    """The global batch as samples x ranks x micro-batches."""
    batch, cap = settings.trainer.global_batch_size, settings.data.max_num_tokens_after_packing
    share = batch // ranks
    micro = math.ceil(share / max_samples)
    text = f"{batch:,} = {_of(share / micro, 'sample')} x {_of(ranks, 'rank')} x {_of(micro, 'micro-batch', 'es')}"
    return text if cap == -1 else f"{text}, of at most {cap:,} tokens each, so that there may be more"


def _of(number: float, what: str, plural: str = "s") -> str:
    return f"{number:g} {what}{'' if number == 1 else plural}"


def _steps(settings: Settings, num_windows: int) -> str:
    """The steps, their samples, passes over the data, and where the run has seen `trainer.reference_samples`."""
    trainer = settings.trainer
    samples = trainer.steps * trainer.global_batch_size
    passes = "" if not num_windows else f" = {samples / num_windows:.3g} passes over the data"
    text = f"{trainer.steps:,} = {samples:,} samples{passes}"
    if trainer.reference_samples is None:
        return text
    reached = trainer.reference_samples / trainer.global_batch_size
    return f"{text}; the reference's {trainer.reference_samples:,} samples: step {reached:,.0f}"


def _rate(settings: Settings) -> str:
    """The peak learning rate, and what it is made of."""
    optimizer, batch = settings.optimizer, settings.trainer.global_batch_size
    factor = {"none": "", "linear": "{} / {}", "sqrt": "sqrt({} / {})"}[optimizer.lr_scaling]
    made = f" = {optimizer.lr:g} x {factor.format(batch, optimizer.reference_batch)}" if factor else ""
    return f"{optimizer.rate(batch):g}{made} at its peak"


def _to_open(logger: Mapping[str, Mapping[str, Any]], run_dir: Path) -> str:
    """What shows the run while it goes: files of its directory, named once above."""
    curves = any(str(options.get(TARGET, "")).endswith(".TensorBoardSink") for options in logger.values())
    return (f"tensorboard --logdir {shown(run_dir)}, " if curves else "") + "train.log there"


def next_steps(run_dir: Path, how: str, num_bad: int, goes_on: bool) -> str:
    """The last words: `how` it ended, where everything is and what to look at. `num_bad`: windows that were replaced;
    `goes_on`: it was stopped, and can be resumed."""
    folder = shown(run_dir)
    lines = [f"{how}. Run directory: {run_dir}"]
    if (run_dir / "tensorboard").is_dir():
        lines.append(f"  curves:      tensorboard --logdir {folder}")
    lines.append(f"  numbers:     {folder}/metrics.jsonl")
    links = [name for name in ("last", "best", "lowest") if (run_dir / "checkpoints" / name).is_symlink()]
    lines += [f"  {name}:{' ' * (12 - len(name))}{folder}/checkpoints/{name}{_step(run_dir, name)}" for name in links]
    if num_bad:
        lines.append(f"  unreadable:  {num_bad} windows were replaced by others, see {folder}/quarantine.jsonl")
    if goes_on:
        lines.append(f"  go on with:  the same command and resume=auto paths.run_dir={folder}")
    return "\n".join(lines)


def _step(run_dir: Path, link: str) -> str:
    target = os.readlink(run_dir / "checkpoints" / link)
    return f" (step {int(target)})" if target.isdigit() else ""
