"""All that a training needs, looked at in turn: what a mistake leaves unknown is left out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from opentau_train import api
from opentau_train.composing import checked
from opentau_train.config.bounds import at_least, positive
from opentau_train.config.settings import Settings
from opentau_train.data.lint.judge import Judged
from opentau_train.data.lint.report import contradiction, lint, report
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.errors import UserError
from opentau_train.tools import check
from opentau_train.tools.plan import rehearsed
from opentau_train.tools.preflight.lines import Line, tried
from opentau_train.tools.preflight.machine import GIB, disk, memory
from opentau_train.tools.preflight.rendezvous import Topology, rendezvous
from opentau_train.tools.preflight.walltime import seconds_of, walltime


def look_at(composed: Sequence[str], options: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """(The lines of a training with the arguments `composed`, all that the rows say). Raises `UserError` for a mistake
    in the tool's own arguments."""
    limit, device_bytes = _bounds(options)
    trees: list[dict[str, Any]] = []
    plans: list[Mixture] = []
    details: list[str] = []

    def settings_lines() -> list[Line]:
        trees.append(api.compose(composed))
        trainer = trees[0]["trainer"]
        return [Line("settings", "ok", f"{trainer['steps']} steps of {trainer['global_batch_size']} samples")]

    def data_lines() -> list[Line]:
        plan, infos = check.open_data(settings, options.schema)
        plans.append(plan)
        described = check.describe_mixture(plan).values()
        there = [Line("data", "ok", f"{info.root}: {info.version}, {check.size_of(info)}") for info in infos]
        return there + [Line("data", "warning" if i else "ok", text) for own in described for i, text in enumerate(own)]

    lines = tried("settings", settings_lines)
    met, topology = rendezvous(os.environ, options.ranks)
    if not trees:
        return lines + met, []
    tree, settings = trees[0], checked(trees[0])
    lines += tried("weights", lambda: [Line("weights", "ok", path) for path in check.check_weights(settings)])
    lines += tried("data", data_lines)
    for plan in plans:  # one, if the data could be opened
        lines += tried("rows", partial(_rows, plan, options.episodes, details))
        lines += _of_machine(settings, plan, topology, device_bytes)
    lines += tried("walltime", lambda: walltime(settings, tree, options.rate, limit))
    return lines + met, details


def _bounds(options: argparse.Namespace) -> tuple[float | None, int | None]:
    """(Seconds that the job has, bytes of a device), where they are given. Raises `UserError`."""
    positive("--rate", options.rate)
    positive("--device-memory", options.device_memory)
    if options.ranks is not None:
        at_least("--ranks", options.ranks, 1)
    try:
        limit = None if options.walltime is None else seconds_of(options.walltime)
    except ValueError as error:
        remedy = "write D-HH:MM:SS, as for sbatch --time"
        raise UserError(f"'{options.walltime}' is no time", where="--walltime", remedy=remedy) from error
    return limit, None if options.device_memory is None else int(options.device_memory * GIB)


def _rows(plan: Mixture, num_episodes: int, details: list[str]) -> list[Line]:
    """What contradicts the declarations, and what casts doubt on them. All that the rows say goes to `details`."""
    if not num_episodes:
        return []
    judged: Mapping[str, Judged] = lint(plan.datasets, plan.groups, num_episodes)
    lines = []
    for name, of_source in judged.items():
        details += report(name, of_source)
        wrong = contradiction({name: of_source})
        if wrong is not None:
            lines.append(Line.of("rows", wrong))
        for verdict in of_source.verdicts:
            if verdict.answer == "doubt":
                what = f"{name}: {verdict.finding.name} may be {verdict.finding.value}, declared {verdict.declared}"
                lines.append(Line("rows", "warning", what, verdict.where, verdict.remedy))
    looked = f"up to {num_episodes} episodes of each source: nothing against what is declared of them"
    return lines or [Line("rows", "ok", looked)]


def _of_machine(settings: Settings, plan: Mixture, launch: Topology, device_bytes: int | None) -> list[Line]:
    """What the policy takes of the disk and of a device."""
    made = []

    def rehearse() -> list[Line]:
        made.append(rehearsed(settings, plan))
        return []

    lines = tried("policy", rehearse)
    for rehearsal in made:
        lines += tried("disk", partial(disk, settings, rehearsal))
        lines += tried("memory", partial(memory, settings, rehearsal, launch, device_bytes))
    return lines
