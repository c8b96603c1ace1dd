"""The built-in sample: two small datasets in the schema of `lerobot/droid_1.0.1`, generated once and cached.

An arm reaches for a coloured ball on a table, again and again. The ball's place is drawn at random and is visible in
the images alone: state, text and timing don't tell it. So a policy that ignores the images can't know where the arm
goes next. "joint" and "ee" hold different episodes; they differ in the flat `action` and `observation.state`: joint
angles or the tool's pose, each with the gripper.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.data.builtin import arm, scene, video, writer
from opentau_train.data.builtin.video import Camera
from opentau_train.data.builtin.writer import Episode, Feature, Layout
from opentau_train.errors import UserError, check_machine

CONTROL_MODES = ("joint", "ee")

_SOURCES = (__file__, arm.__file__, scene.__file__, video.__file__, writer.__file__, rng.__file__)
_WORKSPACE = np.array([(0.33, 0.67), (-0.38, 0.38)])  # x and y of the ball's centre, metres
_MIN_HOP = 0.15  # metres between a ball's place and its next
_MIN_REACH, _EXTRA_REACH, _LONG_WAY = 16, 8, 1.5  # frames, more frames, and the way (rad) that takes all of them
_LIFT = 0.05  # metres that the hand rises half way
_NUM_TOUCH = 3  # frames to close the gripper at the end of a reach
_NUM_DWELL = 8  # frames at rest while the gripper opens; the ball has hopped already
_LAG = 0.3  # share of the last command in the measured joints
_NOISE = (0.001, 0.005)  # standard deviation of the measured joints (rad) and gripper
_PHRASES = ("reach the {} ball", "move the gripper to the {} ball", "touch the {} ball")
_POSE = ["x", "y", "z", "roll", "pitch", "yaw"]
_JOINTS = [f"joint_{i}" for i in range(arm.NUM_JOINTS)]


@dataclass(frozen=True)
class SampleSpec:
    """What to generate: `num_episodes` of each control mode, `min_frames` to `max_frames` long."""

    num_episodes: int = 24
    min_frames: int = 72
    max_frames: int = 140
    fps: int = 15
    episodes_per_data_file: int = 8
    episodes_per_video_file: int = 4
    seed: int = 0

    @property
    def stamp(self) -> str:
        """Names this specification and the code that generates from it: a change of either makes a new directory."""
        digest = hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=6)
        for source in _SOURCES:
            digest.update(Path(source).read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Trajectory:
    """One episode of L frames: `command` [L+1, 8] and `measured` [L, 8] joints (rad) and gripper (0 open, 1 closed),
    `ball` [L, 3] m, the name of its `colour`, the `phrases` that ask for it."""

    command: NDArray[np.float64]
    measured: NDArray[np.float64]
    ball: NDArray[np.float64]
    colour: str
    phrases: tuple[str, str, str]

    def __len__(self) -> int:
        return len(self.ball)


def ensure_droid_sample(cache_dir: Path, spec: SampleSpec = SampleSpec(), num_processes: int = 2) -> dict[str, Path]:
    """The roots of the sample's datasets, `{"joint": root, "ee": root}`, generated under `cache_dir` if need be.

    The directory appears complete or not at all; of several processes that generate at once, one wins and the
    others discard theirs. The same machine and libraries give the same bytes. Raises `UserError` when `cache_dir`
    can't be written.
    """
    final = Path(cache_dir) / f"droid_sample-{spec.stamp}"
    if not final.is_dir():
        partial = final.with_name(f"{final.name}.partial-{uuid.uuid4().hex}")
        try:
            partial.mkdir(parents=True)
            _generate(partial, spec, num_processes)
            _publish(partial, final)
        except OSError as error:
            check_machine(error, final)
            remedy = "set paths.cache_dir to a writable directory with 50 MB to spare"
            raise UserError(
                f"the built-in sample can't be written: {error}", where=str(final), remedy=remedy
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return {mode: final / mode for mode in CONTROL_MODES}


def _publish(partial: Path, final: Path) -> None:
    try:
        partial.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was faster, with the same content
            raise


def _generate(root: Path, spec: SampleSpec, num_processes: int) -> None:
    """Both datasets under `root`: the videos in `num_processes` fresh interpreters, the tables here meanwhile.

    Fresh, because forking a process that holds torch's threads can deadlock, and multiprocessing's spawn would
    import the caller's main module again.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, str(root), json.dumps(asdict(spec)), str(num_processes)]
    with contextlib.ExitStack() as stack:
        workers = []
        for share in range(num_processes):
            worker = subprocess.Popen(
                [*command, str(share)], env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            workers.append(stack.enter_context(worker))
            stack.callback(worker.kill)
        for mode in CONTROL_MODES:
            episodes = [_episode(plan(spec, mode, i), mode) for i in range(spec.num_episodes)]
            writer.write_tables(root / mode, _layout(spec, mode), episodes)
        for worker in workers:
            assert worker.stderr is not None
            complaint = worker.stderr.read()
            if worker.wait():
                raise ChildProcessError(f"rendering the videos failed: {complaint.strip()[-500:]}")


def write_videos(root: Path, spec: SampleSpec, num_shares: int, share: int) -> None:
    """Every `num_shares`-th group of episodes that share their mp4 files, beginning with group `share`."""
    starts = range(0, spec.num_episodes, spec.episodes_per_video_file)
    groups = [(mode, start) for mode in CONTROL_MODES for start in starts]
    for mode, start in groups[share::num_shares]:
        stop = min(start + spec.episodes_per_video_file, spec.num_episodes)
        planned, layout = [plan(spec, mode, i) for i in range(start, stop)], _layout(spec, mode)
        for camera, (key, stored) in zip(scene.CAMERAS, layout.videos.items()):
            path = root / mode / layout.path(start // spec.episodes_per_video_file, key)
            frames = (frame for trajectory in planned for frame in render(trajectory, camera))
            video.write_video(path, stored, spec.fps, enumerate(frames))


def render(trajectory: Trajectory, camera: str) -> Iterator[NDArray[np.uint8]]:
    """The episode's frames, [180, 320, 3] uint8 RGB, from `camera` (one of `scene.CAMERAS`)."""
    background = scene.backdrop(scene.EXTERIOR[camera]) if camera in scene.EXTERIOR else None
    chains = arm.frames(trajectory.measured[:, :7])
    for chain, gripper, ball in zip(chains, trajectory.measured[:, 7], trajectory.ball):
        world = scene.World(chain, 1.0 - gripper, ball, scene.COLOURS[trajectory.colour])
        if background is None:
            yield scene.render_wrist(world)
        else:
            yield scene.render_exterior(scene.EXTERIOR[camera], background, world)


def plan(spec: SampleSpec, mode: str, episode: int) -> Trajectory:
    """Episode number `episode` of a control mode: a pure function of its arguments.

    The arm starts anywhere over the table and reaches for one ball after the other until the last frame. A longer
    way takes more frames, 16 to 24. The gripper closes as it arrives; then the ball hops to its next place, which is
    thus in sight before the arm sets out.
    """
    key = rng.key(spec.seed, "droid_sample", mode, episode)
    length, colour, third = rng.uniform(rng.fold(key, 0), 3)
    num_frames = spec.min_frames + int(length * (spec.max_frames + 1 - spec.min_frames))
    places = _places(rng.key(key, "places"), 2 + num_frames // (_MIN_REACH + _NUM_DWELL))
    command, ball = _reaches(places)
    command, ball = command[: num_frames + 1], ball[:num_frames]
    previous = np.concatenate([command[:1], command[:-2]])
    noise = rng.normal(rng.fold(key, 1, np.arange(num_frames)), 8) * ([_NOISE[0]] * 7 + [_NOISE[1]])
    measured = command[:-1] + _LAG * (previous - command[:-1]) + noise
    measured[:, 7] = measured[:, 7].clip(0.0, 1.0)
    name = list(scene.COLOURS)[int(colour * len(scene.COLOURS))]
    phrases = [phrase.format(name) for phrase in _PHRASES]
    return Trajectory(command, measured, ball, name, (phrases[0], phrases[1], phrases[2] if third < 0.5 else ""))


def _places(key: int, num: int) -> NDArray[np.float64]:
    """`[num, 2]` x, y in the workspace (m), uniform, each at least `_MIN_HOP` from the one before."""
    low, high = _WORKSPACE.T
    chosen: list[NDArray[np.float64]] = []
    for candidate in low + (high - low) * rng.uniform(rng.fold(key, np.arange(8 * num + 32)), 2):
        if len(chosen) < num and (not chosen or np.linalg.norm(candidate - chosen[-1]) >= _MIN_HOP):
            chosen.append(candidate)
    return np.array(chosen)


def _reaches(places: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """The commands [F, 8] of going from the first place [2] to each further one, and the ball [F, 3] at them."""
    x, y = places.T
    # The hand's height, lean and turn depend on the place, so that all six numbers of its pose tell the goal.
    height = (1.8 + 2.0 * (x - 0.5)) * scene.BALL_RADIUS
    poses = np.column_stack([x, y, height, np.pi + 0.5 * y, -0.8 * (x - 0.5), 0.4 * np.arctan2(y, x)])
    balls = np.column_stack([places, np.full(len(places), scene.BALL_RADIUS)])
    goals = arm.reach(poses)
    lifts = arm.reach((poses[:-1] + poses[1:]) / 2 + [0, 0, _LIFT, 0, 0, 0]) - (goals[:-1] + goals[1:]) / 2
    commands, seen = [np.append(goals[0], 0.0)[None]], [balls[1:2]]
    for i, (start, goal, lift) in enumerate(zip(goals[:-1], goals[1:], lifts), start=1):
        way = float(np.linalg.norm(goal - start))
        num_reach = _MIN_REACH + round(_EXTRA_REACH * min(1.0, way / _LONG_WAY))
        step = np.arange(1, num_reach + 1)
        s = step[:, None] / num_reach
        moving = start + (10 * s**3 - 15 * s**4 + 6 * s**5) * (goal - start)  # minimum jerk (Flash & Hogan 1985)
        moving += 64 * (s * (1 - s)) ** 3 * lift
        closing = np.clip((step - num_reach + _NUM_TOUCH) / _NUM_TOUCH, 0.0, 1.0)
        opening = 1.0 - np.arange(1, _NUM_DWELL + 1) / _NUM_DWELL
        commands.append(np.column_stack([moving, closing]))
        commands.append(np.column_stack([np.tile(goal, (_NUM_DWELL, 1)), opening]))
        seen += [np.tile(balls[i], (num_reach, 1)), np.tile(balls[min(i + 1, len(balls) - 1)], (_NUM_DWELL, 1))]
    return np.concatenate(commands), np.concatenate(seen)


def _layout(spec: SampleSpec, mode: str) -> Layout:
    def vector(names: list[str]) -> Feature:
        return Feature("float32", (len(names),), {"axes": names})

    text, flat = Feature("string", (1,)), vector([*(_JOINTS if mode == "joint" else _POSE), "gripper"])
    size, per_file = (scene.HEIGHT, scene.WIDTH), spec.episodes_per_video_file
    camera = Camera("libx264", size, options=video.X264, episodes_per_file=per_file)
    features = {name: text for name in ("language_instruction", "language_instruction_2", "language_instruction_3")}
    for side in ("observation.state", "action"):
        features[f"{side}.gripper_position"] = vector(["gripper"])
        features[f"{side}.cartesian_position"] = vector(_POSE)
        features[f"{side}.joint_position"] = vector(_JOINTS)
        features[side] = flat
    return Layout(
        features,
        {f"observation.images.{name}": camera for name in scene.CAMERAS},
        spec.fps,
        robot_type="franka",
        episodes_per_data_file=spec.episodes_per_data_file,
        extra_info={"control_mode": mode},
    )


def _episode(trajectory: Trajectory, mode: str) -> Episode:
    first, second, third = trajectory.phrases
    columns: dict[str, Any] = {
        "language_instruction": first,
        "language_instruction_2": second,
        "language_instruction_3": third,
    }
    # The action at a frame is the command for the next one, absolute.
    for side, rows in (("observation.state", trajectory.measured), ("action", trajectory.command[1:])):
        joints, gripper = rows[:, :7], rows[:, 7:]
        pose = arm.cartesian(joints)
        columns[f"{side}.gripper_position"] = gripper
        columns[f"{side}.cartesian_position"] = pose
        columns[f"{side}.joint_position"] = joints
        columns[side] = np.concatenate([joints if mode == "joint" else pose, gripper], axis=1)
    return Episode(first, len(trajectory), columns)


def _end_with_parent() -> None:
    """Stdin is a pipe that the parent holds open: its end is the parent's, however it came."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _root, _spec, _num_shares, _share = sys.argv[1:]
    write_videos(Path(_root), SampleSpec(**json.loads(_spec)), int(_num_shares), int(_share))
