"""Everything that a run validates with: its evaluators, their plans, and the workers that read the windows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentau_train.config.settings import ValidationSettings
from opentau_train.config.typed import bind, instantiate
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.distributed.stopping import StopFlag
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World
from opentau_train.errors import BadSample, UserError
from opentau_train.models.average import Ema
from opentau_train.models.policy import Policy
from opentau_train.validation.evaluator import Context, Evaluation, Evaluator
from opentau_train.validation.losses import LossEvaluator
from opentau_train.validation.plan import ValidationPlan
from opentau_train.validation.reader import Reader

if TYPE_CHECKING:  # takes 2 s: not where settings are only checked
    from opentau_train.distributed.parallel import Replicas

log = logging.getLogger(__name__)


def open_evaluators(settings: ValidationSettings) -> dict[str, Evaluator]:
    """The evaluators that `validation.evaluators` names, in its order. Raises `UserError` for a mistake in any
    definition, also of one that isn't named."""
    where = "validation.evaluator"
    for name, options in settings.evaluator.items():
        bind(options, f"{where}.{name}", [])
    return {name: instantiate(settings.evaluator[name], f"{where}.{name}") for name in settings.evaluators}


class Validation:
    """Runs the evaluators, as often as it is asked to. Close it to end the workers.

    `plans`: what each evaluator reads, by its name; `batch_size` is used where the settings name none.
    """

    def __init__(
        self,
        mixture: Mixture,
        settings: ValidationSettings,
        evaluators: Mapping[str, Evaluator],
        world: World,
        batch_size: int,
    ):
        self.settings, self.evaluators, self.world = settings, evaluators, world
        self.batch_size = settings.batch_size or batch_size
        self.plans = {
            name: evaluator.plan(mixture, settings, self.batch_size, world.data_size)
            for name, evaluator in evaluators.items()
        }
        plans = list(self.plans.values())
        self._reader = Reader(mixture, plans, world.data_rank, skip_bad=settings.on_bad_sample == "skip")

    @property
    def num_windows(self) -> int:
        """Windows of the evaluator that reads the most."""
        return max((len(plan.windows) for plan in self.plans.values()), default=0)

    @property
    def loss_plan(self) -> ValidationPlan | None:
        """The plan of the losses that choose the best checkpoint; None where no loss evaluator is named."""
        names = (name for name, evaluator in self.evaluators.items() if isinstance(evaluator, LossEvaluator))
        return next((self.plans[name] for name in names), None)

    def run(
        self,
        policy: Policy,
        replicas: Replicas,
        ema: Ema | None,
        stop: StopFlag | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """All evaluators, one after the other, as one evaluation. Collective; parameters and ambient random state are
        afterwards what they were. Raises as `Context.measure`, and `UserError` where two evaluators use a tag."""
        stop, progress = stop or StopFlag(), progress or Progress()
        whole = Evaluation({})
        for number, (name, evaluator) in enumerate(self.evaluators.items()):
            context = Context(
                policy, replicas, ema, self.plans[name], number, self._reader, self.world, self.settings, stop, progress
            )
            whole = _joined(whole, evaluator.run(context), name)
        if self.world.is_main:
            _warn(whole.left_out)
        return whole

    def close(self) -> None:
        self._reader.close()


def _joined(whole: Evaluation, part: Evaluation, name: str) -> Evaluation:
    """Both in one; the first scores are the whole's."""
    twice = whole.row.keys() & part.row.keys()
    if twice:
        raise UserError(
            f"the evaluator '{name}' gives {min(twice)}, and so does one before it",
            where="validation.evaluators",
            remedy=f"leave one of them out, or let {name} use tags of its own",
        )
    windows = {(bad.dataset, bad.episode, bad.frame): bad for bad in (*whole.left_out, *part.left_out)}
    scores = part.scores if whole.scores is None else whole.scores
    return Evaluation(whole.row | part.row, whole.pictures + part.pictures, tuple(windows.values()), scores)


def _warn(left_out: tuple[BadSample, ...]) -> None:
    """Name what was left out: a line an episode."""
    first = {(b.dataset, b.episode): b for b in reversed(left_out)}
    for key, num in Counter((b.dataset, b.episode) for b in left_out).items():
        log.warning("validation left out %d windows that can't be read, the first: %s", num, first[key])
