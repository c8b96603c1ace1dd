"""The evaluator `rollout`: the success rate of the policy in simulators, beside the losses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from opentau_train.config import typed
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.errors import UserError
from opentau_train.models.policy import Policy
from opentau_train.simulation.environment import declared
from opentau_train.simulation.rollout import Rollouts
from opentau_train.simulation.success import in_words, success_row
from opentau_train.types import Group
from opentau_train.validation.evaluator import (
    Attachment,
    Compared,
    Context,
    Evaluation,
    Evaluator,
    Picture,
    Scores,
    evaluating,
)
from opentau_train.validation.plan import ValidationPlan

if TYPE_CHECKING:  # takes seconds: not where settings are only checked
    from opentau_train.deploy.policy import RobotPolicy

log = logging.getLogger(__name__)

PREFIX = "Rollout"
WHERE = "validation.evaluator.rollout.environments"


class RolloutEvaluator(Evaluator):
    """`Rollout/{environment}/Success` with its 95 % interval (`/Low`, `/High`), `/Episodes`, `/Length` and `/Replaced`
    (simulators that crashed or hung), `Rollout/Success`, their mean; a strip of pictures, an mp4 and a GIF of the first
    `videos` episodes. With an average of the weights it is that which plays, as it is what is exported.

    `environments` {NAME: what conf/simulation/ has}; `norm_head`: which of the policy's robots plays, None: the
    environment's; `rollouts`: the fields of `Rollouts`. Its scores can choose the best checkpoint:
    `validation.best=rollout/success`.
    """

    reads: ClassVar[bool] = False

    def __init__(self, environments: dict[str, dict[str, Any]], norm_head: str | None = None, **rollouts: Any):
        self.environments, self.norm_head = environments, norm_head
        self.rollouts = typed.build(Rollouts, rollouts, "validation.evaluator.rollout")
        if not self.environments:
            raise UserError(
                "the evaluator rollout has no environment",
                where=WHERE,
                remedy="add one of conf/simulation/: +simulation@" + WHERE + ".NAME=reach",
            )
        for name, tree in self.environments.items():
            declared(tree, f"{WHERE}.{name}")

    def compared(self, plan: ValidationPlan, policy: Policy) -> Compared:
        names = list(self.environments)
        return Compared(
            episodes=tuple(f"{name}/{episode}" for name in names for episode in range(self.rollouts.episodes)),
            group_of=np.repeat(np.arange(len(names)), self.rollouts.episodes),
            groups=tuple(Group(name, PREFIX, "", 1.0) for name in names),
            weights=(1.0,),
            episode_of=np.arange(len(names) * self.rollouts.episodes),
        )

    def run(self, context: Context) -> Evaluation:
        """All environments' episodes. Raises on all ranks alike as `play`."""
        from opentau_train.simulation.play import Session, play, robot_for

        world = context.world
        session = Session(world, context.replicas.sharded, context.stop, context.progress)
        row: dict[str, float] = {}
        results, pictures, files = [], [], []
        with _weights_to_play(context), evaluating(context.policy, context.replicas):
            policy = _robot_policy(context)
            for name, tree in self.environments.items():
                where = f"{WHERE}.{name}"
                robot = robot_for(policy, declared(tree, where), where, self.norm_head)
                played = play(name, tree, self.rollouts, policy, robot, session)
                row |= success_row(played.results, played.num_lost, f"{PREFIX}/{name}")
                results.append(played.results)
                for film in played.films:
                    file, tag = f"rollout_{name}_{film.episode}", f"{PREFIX}/{name}/Episode{film.episode}"
                    pictures.append(Picture(file, tag, film.strip))
                    files += [Attachment(file, ".mp4", film.mp4), Attachment(file, ".gif", film.gif)]
                if world.is_main:
                    log.info(in_words(row, f"{PREFIX}/{name}"))
        rates = [row[f"{PREFIX}/{name}/Success"] for name in self.environments]
        row[f"{PREFIX}/Success"] = float(np.mean(rates))
        failed = 1.0 - np.concatenate(results)[:, 0]
        sums = np.stack([failed, np.ones_like(failed)], axis=-1)[:, None, :]
        scores = Scores(1.0 - row[f"{PREFIX}/Success"], sums)
        return Evaluation(row, tuple(pictures), scores=scores, files=tuple(files))


@contextmanager
def _weights_to_play(context: Context) -> Iterator[None]:
    if context.ema is None:
        yield
    else:
        with context.ema.applied_to(context.policy):
            yield


def _robot_policy(context: Context) -> RobotPolicy:
    """The policy that is being trained, as a robot has it: with the transforms of its mixture."""
    from opentau_train.checkpoints.convention import convention_of
    from opentau_train.checkpoints.pretrained import Loaded
    from opentau_train.deploy.policy import RobotPolicy
    from opentau_train.deploy.robots import robots_of

    mixture, world = context.plan.mixture, context.world
    convention = convention_of(mixture)
    pipelines: dict[str, dict[str, Pipeline]] = {}
    for dataset, pipeline in zip(mixture.datasets, mixture.pipelines, strict=True):
        for head in convention["datasets"][dataset.name]:
            pipelines.setdefault(head, {})[dataset.name] = pipeline
    trainer = {"precision": world.accelerator.mixed_precision}
    loaded = Loaded(
        context.policy, mixture.stats, {**convention, "config": {"trainer": trainer}}, pipelines, mixture.spec
    )
    return RobotPolicy(loaded, world.device, robots_of(loaded))
