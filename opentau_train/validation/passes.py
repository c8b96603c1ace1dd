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
from opentau_train.validation.evaluator import Compared, Context, Evaluation, Evaluator, Scores
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
    def has_work(self) -> bool:
        """Whether there is anything to measure: held-out windows, or an evaluator that needs none."""
        return self.num_windows > 0 or not all(evaluator.reads for evaluator in self.evaluators.values())

    def compared(self, policy: Policy) -> Compared | None:
        """What the scores that choose the best checkpoint are of; None where no evaluator gives them."""
        name = self.settings.chooses_best
        return self.evaluators[name].compared(self.plans[name], policy) if name in self.evaluators else None

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
            part = evaluator.run(context)
            scores = part.scores if name == self.settings.chooses_best else whole.scores
            whole = _joined(whole, part, name, scores)
        if self.world.is_main:
            _warn(whole.left_out)
        return whole

    def close(self) -> None:
        self._reader.close()


def _joined(whole: Evaluation, part: Evaluation, name: str, scores: Scores | None) -> Evaluation:
    """Both in one."""
    twice = whole.row.keys() & part.row.keys()
    if twice:
        raise UserError(
            f"the evaluator '{name}' gives {min(twice)}, and so does one before it",
            where="validation.evaluators",
            remedy=f"leave one of them out, or let {name} use tags of its own",
        )
    windows = {(bad.dataset, bad.episode, bad.frame): bad for bad in (*whole.left_out, *part.left_out)}
    pictures, files = whole.pictures + part.pictures, whole.files + part.files
    return Evaluation(whole.row | part.row, pictures, tuple(windows.values()), scores, files)


def _warn(left_out: tuple[BadSample, ...]) -> None:
    """Name what was left out: a line an episode."""
    first = {(b.dataset, b.episode): b for b in reversed(left_out)}
    for key, num in Counter((b.dataset, b.episode) for b in left_out).items():
        log.warning("validation left out %d windows that can't be read, the first: %s", num, first[key])
