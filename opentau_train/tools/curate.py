"""Which dataset hurts? Ranks a run's sources and episodes by loss, outlier score and label noise, and says what to try.

    python -m opentau_train.tools.curate RUN [--target DATASET] [--episodes 64] [--windows 32] [--out FILE.json]
    python -m opentau_train.tools.curate RUN/checkpoints/00001000 data.sources.main.root=/new/place

Needs a run and its data; one with `flight_recorder=true` tells more. At the run's newest checkpoints, or the one
that is named, it takes the gradients of some windows of each source and of what is held out, and compares them.
With `--target` a source is trusted, and judges the others. docs/curate.md has an example, and says what is what.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 for what the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from opentau_train import cli
from opentau_train.checkpoints import commit, contents, manifest, pretrained
from opentau_train.checkpoints.card import FOLDER, read_card, read_stats
from opentau_train.config.bounds import at_least
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.open import open_plan, with_statistics
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.data.mixture.table import align
from opentau_train.errors import EXIT_OK, UserError, did_you_mean
from opentau_train.log import log_to
from opentau_train.models.policy import Policy
from opentau_train.pages.document import finite
from opentau_train.tools.curating import losses
from opentau_train.tools.curating.findings import Findings, find
from opentau_train.tools.curating.gradients import Gradients, measure, parts_of, together
from opentau_train.tools.curating.sketch import Sketch
from opentau_train.tools.flight import read_losses
from opentau_train.tools.options import Parser
from opentau_train.tools.out import make_directory, writing
from opentau_train.tools.why import read_settings

LEAST = {"checkpoints": 1, "episodes": 2, "windows": 1, "draws": 1, "sketch": 64, "top": 1}
"""{option: its least value}"""


@dataclass(frozen=True)
class Opened:
    """A run's policy and data, with the `checkpoints` that are looked at, oldest first."""

    checkpoints: tuple[Path, ...]
    policy: Policy
    mixture: Mixture

    @property
    def run_dir(self) -> Path:
        return self.checkpoints[-1].parent.parent

    @property
    def steps(self) -> str:
        """Those of the checkpoints, by their names, in words."""
        return " and ".join(checkpoint.name.lstrip("0") or "0" for checkpoint in self.checkpoints)


def open_run(options: argparse.Namespace) -> Opened:
    """The run's last few checkpoints, or the one that is named, with the data that its configuration names, as the
    `overrides` change that. Raises `UserError`."""
    checkpoint = commit.at(options.run)
    is_run = checkpoint != Path(options.run).expanduser().resolve()
    several = commit.complete(checkpoint.parent)[-options.checkpoints :] if is_run else [checkpoint]
    settings = read_settings(checkpoint.parent.parent, options.overrides, options.trust)
    for path in several:
        manifest.check(path)
    card = pretrained.with_base(read_card(checkpoint / FOLDER, options.trust), options.base)
    policy = pretrained.build(card)
    plan = with_statistics(open_plan(settings, resolve_sources(settings)), read_stats(checkpoint / FOLDER))
    on_cuda = torch.cuda.is_available() and settings.trainer.device != "cpu"
    policy.to("cuda" if on_cuda else "cpu")
    return Opened(tuple(several), policy, plan.for_policy(policy.wants()))


def gradients_of(opened: Opened, options: argparse.Namespace) -> Gradients:
    """Those of the windows that `options` ask for, at each of the checkpoints."""
    sketch = Sketch(opened.policy, options.sketch, opened.mixture.seed)
    parts = list(parts_of(opened.mixture, options.episodes, options.windows))
    measured = []
    for checkpoint in opened.checkpoints:
        contents.load_weights(checkpoint, opened.policy)
        measured.append(measure(opened.policy, opened.mixture, parts, sketch, options.draws))
    return together(measured)


def target_groups(mixture: Mixture, names: Sequence[str]) -> set[int]:
    """The groups that `names` mean: DATASET or DATASET/CONTROL_MODE. Raises `UserError` for one that isn't there."""
    known = [name for group in mixture.groups for name in (group.dataset, group.tag)]
    for name in names:
        if name not in known:
            raise UserError(
                f"no dataset or group is called '{name}'{did_you_mean(name, known)}",
                where="--target",
                remedy=f"choose of {', '.join(dict.fromkeys(known))}",
            )
    return {g for g, group in enumerate(mixture.groups) if {group.dataset, group.tag} & set(names)}


def describe(findings: Findings, top: int) -> str:
    """The tables, suggestions and notes as text; of the episodes the `top` first."""
    tags = list(dict.fromkeys(tag for source in findings.sources for tag in source.alignment))
    rows: list[tuple[str, ...]] = [
        ("source", "share", "loss", "held out", "label noise", "alignment", *(f"with {t}" for t in tags))
    ]
    for s in findings.sources:
        cells = (str(s.alignment[tag]) if tag in s.alignment else "-" for tag in tags)
        rows.append(
            (s.dataset, f"{s.share:.1%}", _short(s.loss), _short(s.held_out), _signed(s.noise), str(s.score), *cells)
        )
    lines = ["sources, worst first", *align(rows), ""]
    rows = [("source", "episode", "", "loss", "outlier", "label noise", "")]
    for e in findings.episodes[:top]:
        side, verdict = "held out" if e.held_out else "", "wrong labels" if e.is_wrong else ""
        rows.append((e.dataset, str(e.episode), side, _short(e.loss), _short(e.outlier), str(e.noise), verdict))
    lines += [f"episodes, worst first ({min(top, len(findings.episodes))} of {len(findings.episodes)})", *align(rows)]
    lines += ["", *(f"note: {note}" for note in findings.notes)]
    for suggestion in findings.suggestions:
        lines += [f"to try: {suggestion.why}", f"  {' '.join(suggestion.overrides)}"]
    if findings.suggestions:
        lines.append(
            "Add one of these to the arguments of the training, in a new run directory, and compare what is held"
        )
        lines.append("out of a source that you trust.")
    else:
        lines.append("nothing to try: no source and no episode stands against the held-out data by more than chance")
    return "\n".join(lines)


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def run(options: argparse.Namespace) -> Findings:
    """Do what `options` ask for. Raises `UserError`; for a mistake in `options`, before anything is read."""
    for name, least in LEAST.items():
        at_least(f"--{name}", getattr(options, name), least)
    if options.out is not None:
        make_directory(options.out)
    opened = open_run(options)
    mixture, names = opened.mixture, [d.name for d in opened.mixture.datasets]
    targets = target_groups(mixture, options.target)
    gradients = gradients_of(opened, options)
    recorded = losses.of_training(read_losses(opened.run_dir))
    pass_step, validated = losses.of_validation(opened.run_dir, list(opened.policy.loss_weights.values()))
    at_step = f"of windows at step {replace(opened, checkpoints=opened.checkpoints[-1:]).steps}"
    findings = find(
        mixture,
        gradients,
        recorded or losses.of_windows(names, gradients, held_out=False),
        validated or losses.of_windows(names, gradients, held_out=True),
        targets,
    )
    print(f"{opened.run_dir}: gradients of {len(gradients)} parts of episodes, at step {opened.steps}")
    print(
        f"losses in training: {'of the flight recorder' if recorded else at_step + '; flight_recorder=true tells more'}"
    )
    print(f"losses held out: {f'of the best pass, step {pass_step}' if validated else at_step}\n")
    print(describe(findings, options.top))
    if options.out is not None:
        tree = {"checkpoints": list(map(str, opened.checkpoints)), **asdict(findings)}
        with writing(options.out):
            options.out.write_text(json.dumps(finite(tree), indent=1, allow_nan=False) + "\n")
        print(f"written to {options.out}")
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = Parser("curate", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run, or one of its checkpoints")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="DATASET",
        help="a dataset, or DATASET/CONTROL_MODE, that is trusted and judges all; may come several times",
    )
    parser.add_argument("--episodes", type=int, default=64, help="episodes of each source and side to look at (64)")
    parser.add_argument("--windows", type=int, default=32, help="windows of each (32)")
    parser.add_argument("--draws", type=int, default=4, help="draws of noise and flow time for each (4)")
    parser.add_argument("--checkpoints", type=int, default=3, help="of a run, how many of its newest to look at (3)")
    parser.add_argument("--sketch", type=int, default=4096, help="numbers that stand for a gradient (4096)")
    parser.add_argument("--top", type=int, default=16, help="episodes to show (16)")
    parser.add_argument("--out", type=Path, help="file for all of it, e.g. curate.json")
    parser.add_argument("--base", help="where frozen weights that the checkpoint leaves out lie now")
    parser.add_of_recorded_run()
    options = parser.parse_intermixed_args(arguments)

    def work() -> int:
        run(options)
        return EXIT_OK

    with log_to(sys.stderr, is_main=True):
        return cli.answer(work)


if __name__ == "__main__":
    cli.end(main())
