"""Demonstrations by an environment's scripted expert, written as a LeRobot dataset (v3.0).

Attempt k starts where the seed and k say, whatever simulates it and however often it was begun; those that reach the
goal are kept, in their order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.data.builtin import video, writer
from opentau_train.data.builtin.colours import Colours
from opentau_train.errors import UserError
from opentau_train.simulation.environment import Environment, declared
from opentau_train.simulation.pool import Pool
from opentau_train.simulation.simulator import Demonstration

log = logging.getLogger(__name__)

EPISODES_PER_FILE = 10


@dataclass(frozen=True)
class Wanted:
    """`num_episodes` demonstrations from starts that `seed` says, at the goal for `hold` steps at their end; where one
    in `patience` fails to come, the expert can't do the task."""

    num_episodes: int
    seed: int = 0
    hold: int = 8
    patience: int = 20


def attempt_seed(seed: int, number: int) -> int:
    """Of the start of attempt `number`: [0, 2^31), which no evaluation has (`rollout.start_seed`) but by chance."""
    return rng.key(seed, "demonstration", number) >> 33


def demonstrate(tree: Mapping[str, Any], wanted: Wanted, num_processes: int, timeout: float) -> Iterator[Demonstration]:
    """The demonstrations, one by one. Raises `UserError` where the environment can't be made, has no expert, or fails
    in too many attempts in a row; `Fault` where its simulator keeps crashing."""
    num_made = num_failed = number = 0
    with closing(Pool(dict(tree), num_processes, timeout)) as pool:
        while num_made < wanted.num_episodes:
            numbers = range(number, number + num_processes)
            calls = {i: ("demonstrate", attempt_seed(wanted.seed, k), wanted.hold) for i, k in enumerate(numbers)}
            number += num_processes
            for demonstration in pool.run(calls).values():
                num_failed = 0 if demonstration.success else num_failed + 1
                if num_failed == wanted.patience:
                    raise UserError(
                        f"the expert failed in {num_failed} attempts in a row",
                        where="env.expert",
                        remedy="lower env.expert_noise, or raise env.max_steps",
                    )
                if demonstration.success and num_made < wanted.num_episodes:
                    num_made += 1
                    yield demonstration
    log.info("%d demonstrations, %d of %d attempts began in a process that was replaced", num_made, pool.lost, number)


def write(root: Path, tree: Mapping[str, Any], wanted: Wanted, num_processes: int, timeout: float) -> int:
    """Write the demonstrations of the environment that `tree` declares to `root`, which mustn't be there; returns the
    number of frames. Memory holds the pictures of `EPISODES_PER_FILE` episodes. Raises as `demonstrate`."""
    environment = declared(tree, "env")
    episodes: list[writer.Episode] = []
    pictures: list[dict[str, NDArray[np.uint8]]] = []
    layout: writer.Layout | None = None
    for made in demonstrate(tree, wanted, num_processes, timeout):
        layout = layout or _layout(environment, made, dict(tree), wanted)
        columns = {"action": made.actions} | ({"observation.state": made.state} if environment.state_names else {})
        colours = {f"observation.images.{camera}": Colours.of(frames) for camera, frames in made.images.items()}
        episodes.append(writer.Episode(environment.text, len(made.actions), columns, colours=colours))
        pictures.append(made.images)
        if len(pictures) == EPISODES_PER_FILE or len(episodes) == wanted.num_episodes:
            _write_videos(root, layout, (len(episodes) - 1) // EPISODES_PER_FILE, pictures)
            pictures = []
    assert layout is not None
    writer.write_tables(root, layout, episodes)
    return sum(episode.length for episode in episodes)


def _write_videos(root: Path, layout: writer.Layout, number: int, pictures: list[dict[str, NDArray[np.uint8]]]) -> None:
    for key, camera in layout.videos.items():
        frames = (frame for episode in pictures for frame in episode[key.removeprefix("observation.images.")])
        video.write_video(root / layout.path(number, key), camera, layout.fps, enumerate(frames))


def _layout(environment: Environment, first: Demonstration, tree: dict[str, Any], wanted: Wanted) -> writer.Layout:
    def vector(names: tuple[str, ...]) -> writer.Feature:
        return writer.Feature("float32", (len(names),), {"axes": list(names)})

    state = {"observation.state": vector(environment.state_names)} if environment.state_names else {}
    cameras = {
        f"observation.images.{name}": video.Camera(
            "libx264", frames.shape[1:3], options=video.X264 | {"crf": "18"}, episodes_per_file=EPISODES_PER_FILE
        )
        for name, frames in first.images.items()
    }
    return writer.Layout(
        state | {"action": vector(environment.actions)},
        cameras,
        round(environment.fps),
        environment.robot_type,
        episodes_per_data_file=EPISODES_PER_FILE,
        extra_info={
            "control_mode": environment.control_mode,
            "simulation": {"env": json.loads(json.dumps(tree)), "seed": wanted.seed, "hold": wanted.hold},
        },
    )
