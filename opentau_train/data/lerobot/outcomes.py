"""A directory that holds two LeRobot datasets, `success/` and `failure/`, as the Cosmos3-DROID release does."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from opentau_train.config.data import SourceSettings

log = logging.getLogger(__name__)

SUCCESS, FAILURE = "success", "failure"


def by_outcome(name: str, settings: SourceSettings) -> dict[str, SourceSettings]:
    """{name: settings} of the sources that `data.sources.NAME` stands for: itself, unless its directory is no dataset
    but holds some by outcome. Then NAME is `success/` and NAME_failure is `failure/`, with the weight `failure_weight`;
    `success_only` takes the first alone. Logs which it takes.

    Episode numbers (`episodes`, `exclude_episodes`, `val_episodes`) are those of `success/`. A keep-ranges filter may
    know few failures or none: `failure/` is filtered only where it is trained on, and needs no least match.
    """
    root = Path(settings.root or "")
    if settings.root is None or settings.target != SourceSettings.target:
        return {name: settings}
    if _is_dataset(root) or not _is_dataset(root / SUCCESS):
        return {name: settings}
    taken = {name: replace(settings, root=str(root / SUCCESS), success_only=False)}
    what = f"data.sources.{name}: {root} holds datasets by outcome: {name} is {SUCCESS}/"
    if settings.success_only or not _is_dataset(root / FAILURE):
        why = "success_only" if settings.success_only else f"there is no {FAILURE}/"
        log.info("%s, and nothing else is read (%s)", what, why)
        return taken
    taken[f"{name}_{FAILURE}"] = replace(
        settings,
        root=str(root / FAILURE),
        weight=settings.failure_weight,
        episodes=None,
        exclude_episodes=(),
        val_episodes=None,
        use_filter_dict=settings.use_filter_dict and settings.failure_weight > 0,
        filter_min_match=0.0,
    )
    note = "" if settings.failure_weight else ": validated, not trained on"
    log.info(
        "%s, %s_%s is %s/ with weight %g%s; data.sources.%s.failure_weight sets it, success_only=true leaves it out",
        *(what, name, FAILURE, FAILURE, settings.failure_weight, note, name),
    )
    return taken


def _is_dataset(folder: Path) -> bool:
    return (folder / "meta" / "info.json").is_file()
