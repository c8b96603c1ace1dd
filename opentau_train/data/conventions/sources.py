"""What the sources' actions and state mean, as far as they declare it: converted to what a training wants, and the same
wherever statistics are shared."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from opentau_train.config import typed
from opentau_train.config.data import SourceSettings
from opentau_train.data.chunk import row_step
from opentau_train.data.convention import Convention, by_dimension, difference, named
from opentau_train.data.conventions.steps import Conversions, conversions
from opentau_train.data.source import Source
from opentau_train.errors import UserError

log = logging.getLogger(__name__)


def convert(source: Source, settings: SourceSettings, wanted: Convention) -> Conversions:
    """From what the source declares to what is `wanted`; the log says what that is. Raises `UserError`."""
    where = f"data.sources.{source.name}"
    made = conversions(settings.convention, wanted, source.state_names, source.action_names, source.name)
    stepwise = any(part.reference == "delta_step" for part in made.robot_parts["actions"])
    if stepwise and row_step(source.fps, settings.fps) != 1.0:
        raise UserError(
            f"its actions go on from row to row, {source.fps:g} times a second, and can't be taken at {settings.fps:g}",
            where=f"{where}.fps",
            remedy=f"leave {where}.fps out",
        )
    if made.transforms:
        lost = [name for name in source.action_names if name not in made.robot_names]
        parts = "; ".join(map(str, made.convention.actions or ()))
        log.info("%s: actions as %s%s", where, parts, f"; left out: {', '.join(lost)}" if lost else "")
    return made


def check_parts(wanted: Convention, sources: Sequence[Conversions]) -> None:
    """Raises `UserError` for a part of `data.convention` that no source has."""
    for vector in ("state", "actions"):
        have = {part.name for made in sources for part in getattr(made.convention, vector) or ()}
        lacking = [part.name for part in named(getattr(wanted, vector) or ()) if part.name not in have]
        if lacking:
            raise UserError(
                f"no source has the part '{lacking[0]}' of data.convention.{vector}",
                where=f"data.convention.{vector}",
                remedy="leave it out, or give a part of a source that name: data.sources.NAME.convention",
            )


def check_agreement(head: str, one: Conversions, other: Conversions, rates: tuple[float, float]) -> None:
    """Raises `UserError` where two datasets of a norm head declare another meaning of a dimension, after conversions.
    What one of them doesn't declare is unknown, and contradicts nothing. `rates`: of their chunks, steps a second."""
    both, where = f"datasets '{one.source}' and '{other.source}'", f"data.sources.{other.source}"
    apart = f"set {where}.robot_type or control_mode to tell them apart"
    for vector in ("actions", "state"):
        differs = difference(one.parts[vector], other.parts[vector])
        if differs is not None:
            raise UserError(
                f"{both} share norm head {head}, and their {vector} mean different things: {differs}",
                where=f"{where}.convention.{vector}",
                remedy=f"say in data.convention.{vector} what both are converted to, or {apart}",
            )
    stepwise = any(part.reference == "delta_step" for made in (one, other) for part in made.parts["actions"])
    if stepwise and rates[0] != rates[1]:
        raise UserError(
            f"{both} share norm head {head}, and their steps are deltas at different rates: {rates[0]:g} and "
            f"{rates[1]:g} fps",
            where=where,
            remedy=f"convert to reference: delta_start, or {apart}",
        )


def record(sources: Sequence[Conversions]) -> dict[str, Any]:
    """{dataset: what it declares and what the policy is trained in, with a hash of that} for a checkpoint."""
    return {
        made.source: {
            "declared": made.declared.to_json(),
            "trained": made.convention.to_json(),
            "space": made.convention.space,
            "hash": made.convention.digest(),
            "converted": bool(made.transforms),
        }
        for made in sources
        if made.declared != Convention()
    }


def recorded_difference(made: Conversions, recorded: Mapping[str, Any] | None) -> str | None:
    """What a policy was trained on, by its dataset's entry of `record`, where `made` has something else; None where
    it has the same, or nobody knows."""
    if recorded is None:
        return "was trained on actions as its dataset has them" if made.transforms else None
    if recorded["converted"] and not made.parts["actions"]:
        return f"was trained on actions of data.convention {recorded['hash']}"
    trained = typed.build(Convention, recorded["trained"], "conventions")
    for vector in ("actions", "state"):
        parts = by_dimension(getattr(trained, vector) or ())
        differs = difference(parts, made.parts[vector])
        if differs is not None:
            return f"has {vector} that mean something else: {differs}"
    return None
