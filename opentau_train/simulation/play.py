"""A policy plays an environment's episodes: each rank its own, all results on every rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.data.batch import blank_batch
from opentau_train.data.convention import Convention
from opentau_train.deploy.policy import RobotPolicy
from opentau_train.deploy.robots import Robot
from opentau_train.distributed.stopping import StopFlag, Stopped
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World
from opentau_train.errors import Explained, UserError
from opentau_train.simulation.environment import Environment, declared
from opentau_train.simulation.films import Film, film
from opentau_train.simulation.rollout import Rollouts, Running
from opentau_train.simulation.simulator import Seen

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """Who plays: the `world`'s ranks, whose policy is in shards where `sharded`; `stop` asks the rank to leave out the
    rest, `progress` records each chunk for the watchdog."""

    world: World
    sharded: bool = False
    stop: StopFlag = field(default_factory=StopFlag)
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Played:
    """`results` [E, 3] f64 of all episodes (`Running`), how many simulators were replaced, and the films."""

    results: NDArray[np.float64]
    num_lost: int
    films: tuple[Film, ...] = ()


def robot_for(policy: RobotPolicy, environment: Environment, name: str, norm_head: str | None = None) -> Robot:
    """The robot that the policy knows the environment's as: `norm_head`, else the one of its robot type and control
    mode, else the only one. Raises `UserError` where there is none, or it sees, is or does something else."""
    head = norm_head or f"{environment.robot_type}::{environment.control_mode}"
    if norm_head is None and head not in policy.norm_heads and len(policy.norm_heads) == 1:
        head = policy.norm_heads[0]
    robot = policy.robot(head)
    given = {"state": environment.state_names, "actions": environment.actions}
    for what, known in (("state", robot.state_names), ("actions", robot.action_names)):
        own = [word.rpartition(".")[2] for word in known]
        names = given[what]
        if len(own) != len(names) and not (what == "state" and not own):
            raise UserError(
                f"the policy has {len(own)} numbers of {what} ({', '.join(own)}), the environment {len(names)} "
                f"({', '.join(names)})",
                where=f"{name}, norm head {head}",
                remedy="take the environment that it was trained for, or name another of its robots: norm_head=NAME",
            )
        if sorted(own) == sorted(names) and own != list(names):
            raise UserError(
                f"the policy has the {what} {', '.join(own)}, the environment {', '.join(names)}",
                where=f"{name}, norm head {head}",
                remedy="an environment that gives and takes them in the policy's order",
            )
    if robot.cameras and environment.cameras and not set(robot.cameras) & set(environment.cameras):
        raise UserError(
            f"the policy has the cameras {', '.join(robot.cameras)}, the environment {', '.join(environment.cameras)}",
            where=f"{name}.cameras",
            remedy="call them as the policy does: env.cameras={CAMERA: PLACE}",
        )
    both = {v: getattr(environment.convention, v) for v in ("actions", "state") if getattr(robot.convention, v)}
    robot.check(environment.fps, Convention(**both))
    return robot


def play(
    name: str, tree: Mapping[str, Any], rollouts: Rollouts, policy: RobotPolicy, robot: Robot, session: Session
) -> Played:
    """The episodes of the environment `name` that `tree` declares. Collective; raises on all ranks alike `UserError`
    and `Fault` as `Running`, and `Stopped` where any rank was asked to stop."""
    world, environment, error = session.world, declared(tree, name), None
    cameras = {c: place for c, place in environment.cameras.items() if c in robot.cameras}  # drawing costs most
    tree = {**tree, "cameras": cameras}
    running = world.agree(lambda: Running(name, tree, rollouts, world.data_rank, world.data_size))
    halted = False
    with closing(running):
        while not halted:
            session.progress.enter(f"rollout of {name}")
            halted = error is not None or session.stop.poll() > 0
            busy = running.active and not halted
            if session.sharded:
                flags = world.sum(torch.tensor([float(halted), float(busy)])).tolist()
                halted, goes_on = flags[0] > 0, flags[1] > 0
            else:
                goes_on = busy
            if halted or not goes_on:
                break
            try:
                _advance(running if busy else None, environment, policy, robot, rollouts.simulators)
            except Explained as refusal:
                error = refusal
        session.progress.enter(f"all-reduce of the rollout of {name}")
        stopped = error is None and halted
        codes = [error is not None, stopped and session.stop.code == 1, stopped and session.stop.code == 2]
        flags_of = torch.tensor([*map(float, codes), float(running.num_lost)], dtype=torch.float64)
        totals = world.sum_all({"results": torch.from_numpy(running.results), "flags": flags_of})
        failed, preempted, interrupted, num_lost = totals["flags"].tolist()
        if failed:
            raise next(e for e in world.gather(error) if e is not None)
        if preempted or interrupted:
            raise Stopped(2 if interrupted else 1)
        own = [film(episode, moments, environment.fps) for episode, moments in running.films.items()]
    films = sorted((f for part in world.gather(own) for f in part if f is not None), key=lambda f: f.episode)
    return Played(totals["results"].numpy(), int(num_lost), tuple(films))


def _advance(
    running: Running | None, environment: Environment, policy: RobotPolicy, robot: Robot, num_rows: int
) -> None:
    """Sample a chunk for every slot and take its steps; None: forward blank rows, for ranks in step."""
    if running is None:
        policy.sample(blank_batch(policy.loaded.spec).filled_up(num_rows).to(policy.device))
        return
    seen, keys = running.observations()
    batch = policy.batch([_observation(s, environment, robot) for s in seen], robot.norm_head, keys)
    running.take(policy.in_units(policy.sample(batch.to(policy.device)), batch))


def _observation(seen: Seen, environment: Environment, robot: Robot) -> dict[str, Any]:
    state = {"state": seen.state} if robot.state_names else {}
    return {**seen.images, **state, "task": environment.text}
