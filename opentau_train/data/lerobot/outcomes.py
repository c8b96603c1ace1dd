"""A directory that holds two LeRobot datasets, `success/` and `failure/`, as the Cosmos3-DROID release does."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from opentau_train.config.data import SourceSettings
from opentau_train.data.remote.mirror import mirror_at

log = logging.getLogger(__name__)

SUCCESS, FAILURE = "success", "failure"


def by_outcome(name: str, settings: SourceSettings, local: str | None) -> dict[str, SourceSettings]:
    """{name: settings} of the sources that `data.sources.NAME` stands for: itself, unless its directory is no dataset
    but holds some by outcome. Then NAME is `success/` and NAME_failure is `failure/`, with the weight `failure_weight`;
    `success_only` takes the first alone. Logs which it takes. `local` is where the files of `settings.root` are, or,
    where that is a URL, come to be.

    Episode numbers (`episodes`, `exclude_episodes`, `val_episodes`) are those of `success/`. A keep-ranges filter may
    know few failures or none: `failure/` is filtered only where it is trained on, and needs no least match.
    """
    if settings.root is None or local is None or settings.target != SourceSettings.target:
        return {name: settings}
    given, root = settings.root.rstrip("/"), Path(local)
    if _has_dataset(root) or not _has_dataset(root, SUCCESS):
        return {name: settings}
    taken = {name: replace(settings, root=f"{given}/{SUCCESS}", success_only=False)}
    what = f"data.sources.{name}: {given} holds datasets by outcome: {name} is {SUCCESS}/"
    if settings.success_only or not _has_dataset(root, FAILURE):
        why = "success_only" if settings.success_only else f"there is no {FAILURE}/"
        log.info("%s, and nothing else is read (%s)", what, why)
        return taken
    taken[f"{name}_{FAILURE}"] = replace(
        settings,
        root=f"{given}/{FAILURE}",
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


def _has_dataset(root: Path, folder: str = "") -> bool:
    """Whether a dataset lies in `folder` of `root`, here or on the server that `root` is a mirror of."""
    mirror, info = mirror_at(root), root / folder / "meta" / "info.json"
    return info.is_file() if mirror is None else info in mirror
