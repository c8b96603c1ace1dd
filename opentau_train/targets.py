"""What a run, `--cfg job`, the launchers' check and tools say of the settings that a `_target_` takes.

Imports what those classes need and no more: a check, for which users wait, makes half of a run's imports.
"""

from __future__ import annotations

from opentau_train.config.settings import Settings
from opentau_train.config.typed import bind
from opentau_train.optim import check_optimizer
from opentau_train.validation.passes import open_evaluators


def check_targets(settings: Settings) -> None:
    """Raises `UserError` for a mistake in the keys of anything that a `_target_` names. Needs neither data nor ranks: a
    run checks before it opens data for minutes, a launcher before it starts ranks."""
    bind(settings.model, "model", ["spec"])
    bind(settings.scheduler, "scheduler", [])
    check_optimizer(settings.optimizer)
    for name, options in settings.logger.items():
        bind(options, f"logger.{name}", ["context"])
    open_evaluators(settings.validation)
