"""Everything that one validation measures: losses, the averaged weights' losses, action errors, the picture."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.settings import ValidationSettings
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.stopping import StopFlag
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World
from opentau_train.errors import BadSample
from opentau_train.models.policy import Policy
from opentau_train.optim import Ema
from opentau_train.validation.actions import measure_actions
from opentau_train.validation.losses import Scores, evaluate
from opentau_train.validation.plan import ValidationPlan, plan_validation

log = logging.getLogger(__name__)

PICTURE = "Validation-Action/Chunks"


@dataclass(frozen=True)
class Plans:
    """What a validation reads: the windows of the loss pass, and the fewer ones that actions are sampled for (None
    where they aren't)."""

    loss: ValidationPlan
    action: ValidationPlan | None


def plan_passes(mixture: Mixture, settings: ValidationSettings, *, batch_size: int, num_ranks: int) -> Plans:
    """The plans of a mixture for `num_ranks` ranks. `batch_size` counts where the settings name none."""
    size = settings.batch_size or batch_size
    limit = settings.max_samples_per_group
    loss = plan_validation(mixture, limit, batch_size=size, num_ranks=num_ranks)
    if "action" not in settings.metrics:
        return Plans(loss, None)
    fewer = min(settings.max_action_samples, limit or settings.max_action_samples)
    return Plans(loss, plan_validation(mixture, fewer, batch_size=size, num_ranks=num_ranks))


@dataclass(frozen=True)
class Outcome:
    """All tags in `row`, the loss pass's `scores`, and `picture` [H, W, 3] uint8 or None; equal on all ranks."""

    row: dict[str, float]
    scores: Scores
    picture: NDArray[np.uint8] | None = field(default=None, repr=False)


def run_passes(
    policy: Policy,
    replicas: Replicas,
    ema: Ema | None,
    plans: Plans,
    world: World,
    settings: ValidationSettings,
    stop: StopFlag | None = None,
    place: Progress | None = None,
) -> Outcome:
    """The loss pass, then with an average `Validation-EMA/...` with its weights, then the action errors. Collective;
    parameters and ambient random state are afterwards what they were. Raises as `evaluate.evaluate`."""
    scores = evaluate(policy, replicas, plans.loss, world, settings, stop=stop, place=place)
    row = dict(scores.row)
    if ema is not None:
        with ema.applied_to(policy):
            row |= evaluate(policy, replicas, plans.loss, world, settings, "Validation-EMA", stop, place).row
    picture = None
    if plans.action is not None:
        actions = measure_actions(policy, replicas, plans.action, world, settings, stop, place)
        row, picture = row | actions.row, actions.picture
    if world.is_main:
        _warn(scores.left_out)
    return Outcome(row, scores, picture)


def _warn(left_out: tuple[BadSample, ...]) -> None:
    """Name what was left out: a line an episode."""
    first = {(b.dataset, b.episode): b for b in reversed(left_out)}
    for key, num in Counter((b.dataset, b.episode) for b in left_out).items():
        log.warning("validation left out %d windows that can't be read, the first: %s", num, first[key])
