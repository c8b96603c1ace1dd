"""Generated sources whose conventions are known: an arm that picks and places under a slow controller, with a noisy
sensor, latency, a gripper that objects stop, and any of the ways in which datasets write these down.

What isn't planted is drawn from the seed: rate, lengths, noise, latency, the controller's time constant, whether the
gripper's command is on or off or continuous, what share of grasps meets an object, gain and offset of its sensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opentau_train.data.convention import ANGLES, Convention, Format, Part
from opentau_train.data.lint.sample import EpisodeSample

F64 = NDArray[np.float64]
_HOME = np.array([0.0, -0.4, 0.1, -2.0, 0.0, 1.7, 0.7])
_TILT = 0.06
RATES = (10, 15, 20, 30, 50)


@dataclass(frozen=True)
class Arm:
    """How a source writes down what the arm does. `space` joint: seven angles; pose: x, y, z and `rotation`, the hand
    pointing `down` or up, or `forward`, and turning up to `turn` rad to both sides. `reference` of the actions: the
    command, the next state, the command's or the state's difference, or that scaled to [-1, 1]; a pose's difference is
    that of its numbers, or, with a `frame`, a way and a turn in these axes. `shift` moves the actions against the state
    by frames."""

    seed: int
    space: Literal["joint", "pose"] = "joint"
    reference: Literal["command", "next", "command_delta", "state_delta", "scaled_delta"] = "command"
    unit: Literal["rad", "deg"] = "rad"
    rotation: Literal["euler", "euler_zyx", "axis_angle", "xyzw", "wxyz", "rot6d"] = "xyzw"
    action_rotation: Literal["euler", "euler_zyx", "axis_angle", "xyzw", "wxyz", "rot6d"] | None = None
    """None: as the state's."""
    frame: Literal["base", "tool"] | None = None
    down: bool = True
    forward: bool = False
    turn: float = 1.2
    meets: float | None = None
    """The share of grasps that meet an object; None: drawn."""
    begins_closed: bool = False
    open_is_high: bool = True
    """Of the state."""
    command_is_inverted: bool = False
    state_range: tuple[float, float] = (0.0, 1.0)
    action_range: tuple[float, float] = (0.0, 1.0)
    shift: int = 0
    limit: float | None = None
    """Share of the actions' span that is cut off at each end."""
    clock: float = 1.0
    """Seconds that pass in one second of the timestamps that the rate would give."""


def generate(arm: Arm) -> EpisodeSample:
    """The episodes of one source: a pure function of `arm`."""
    rng = np.random.default_rng([arm.seed, 41])
    fps = float(rng.choice(RATES))
    tau, latency = rng.uniform(0.02, 0.25), int(rng.integers(0, 4))
    follow, noise = 1 - np.exp(-1 / (fps * tau)), rng.uniform(0.0003, 0.005)
    hand = _Hand.draw(rng, fps)
    hand = hand if arm.meets is None else replace(hand, meets=arm.meets)
    state, actions, seconds = [], [], []
    for _ in range(int(rng.integers(12, 25))):
        seconds_long = rng.uniform(5, 12)
        command, grasp = _course(rng, arm, fps, seconds_long)
        measured = _follow(command, follow, latency) + noise * rng.normal(size=command.shape)
        told, width = hand.course(rng, grasp)
        as_actions = replace(arm, rotation=arm.action_rotation or arm.rotation)
        s, a = _written(arm, measured), _written(as_actions, _action_path(arm, command, measured))
        if "delta" in arm.reference:
            a = _difference(arm, command, measured)
        s = np.column_stack([s, _scaled(width if arm.open_is_high else 1 - width, arm.state_range)])
        told = told if arm.open_is_high != arm.command_is_inverted else 1 - told
        a = np.column_stack([a, _scaled(told, arm.action_range)])
        keep = slice(3, len(s) - 8)  # the shift needs rows on both sides
        state.append(s[keep])
        actions.append(np.roll(a, arm.shift, axis=0)[keep])
        seconds.append(np.arange(len(state[-1])) / fps * arm.clock + rng.normal(0, 1e-4, len(state[-1])))
    if arm.limit is not None:
        low, high = np.percentile(np.concatenate(actions)[:, :-1], [100 * arm.limit, 100 - 100 * arm.limit], axis=0)
        actions = [np.column_stack([a[:, :-1].clip(low, high), a[:, -1:]]) for a in actions]
    names = [_names(arm, vectors[0].shape[1] - 1) for vectors in (state, actions)]
    return EpisodeSample(
        fps=fps,
        state_names=tuple(f"observation.state.{name}" for name in names[0]),
        action_names=tuple(f"action.{name}" for name in names[1]),
        numbers=tuple(range(len(state))),
        state=state,
        actions=actions,
        seconds=seconds,
    )


def declared(arm: Arm) -> Convention:
    """What the sources that `arm` generates are: the truth."""
    is_delta = "delta" in arm.reference
    unit_known = arm.reference != "scaled_delta"
    absolute: dict[str, Any] = {"reference": "delta_step" if is_delta else "absolute"}
    way = arm.open_is_high != arm.command_is_inverted
    vectors = []
    for vector, is_open, ends in (("state", arm.open_is_high, arm.state_range), ("actions", way, arm.action_range)):
        reference = absolute if vector == "actions" else {}
        unit = {"unit": arm.unit} if vector == "state" or unit_known else {}
        kept = {"reference": "absolute"} if vector == "actions" else {}
        hand = Part("gripper", polarity="open" if is_open else "closed", range=ends, **kept)
        if arm.space == "joint":
            vectors.append((Part("joint", dims=7, **unit, **reference), hand))
            continue
        written: str = (arm.action_rotation if vector == "actions" else None) or arm.rotation
        if vector == "actions" and is_delta:
            written, reference = (
                ("axis_angle", {**reference, "frame": arm.frame}) if arm.frame else ("euler", reference)
            )
        name = cast(Format, {"euler": "euler_xyz", "xyzw": "quat_xyzw", "wxyz": "quat_wxyz"}.get(written, written))
        angle = unit if name in ANGLES else {}
        metres = {"unit": "m"} if unit else {}
        rotation = Part("rotation", rotation=name, **angle, **reference)
        vectors.append((Part("position", **metres, **reference), rotation, hand))
    return Convention(state=vectors[0], actions=vectors[1])


def expected_lag(arm: Arm) -> float:
    """Frames from a row of `generate(arm)`'s actions to the state that it asks for: the latency and the controller's
    mean delay, or the next row; and the shift."""
    rng = np.random.default_rng([arm.seed, 41])
    fps = float(rng.choice(RATES))
    tau, latency = rng.uniform(0.02, 0.25), int(rng.integers(0, 4))
    delay = 1 / (1 - np.exp(-1 / (fps * tau))) + latency
    delay += arm.reference == "command_delta"  # the command has moved by it a row later
    return (1.0 if arm.reference in ("next", "state_delta", "scaled_delta") else delay) - arm.shift


def _course(rng: np.random.Generator, arm: Arm, fps: float, long: float) -> tuple[F64, F64]:
    """(commands [L, 7] of the joints or [L, 6] of the pose, [L] whether the hand is to hold)."""
    if arm.space == "joint":
        centre, reach = _HOME, np.array([0.7, 0.6, 0.5, 0.6, 0.5, 0.6, 0.9])
    else:
        pitch = np.pi / 2 if arm.forward else 0.0
        centre = np.array([0.5, 0.0, 0.2, np.pi if arm.down else 0.0, pitch, 0.0])
        reach = np.array([0.2, 0.3, 0.15, _TILT, _TILT, arm.turn])
    points, holds, at = (
        [centre + 0.02 * reach * rng.normal(size=len(centre))],
        [float(arm.begins_closed)],
        points_at(rng, long),
    )
    path, grasp = [points[0][None]], [np.array(holds)]
    for number, (move, dwell) in enumerate(at):
        goal = centre + reach * rng.uniform(-1, 1, len(centre))
        s = np.arange(1, max(2, round(move * fps)) + 1)[:, None] / max(2, round(move * fps))
        way = points[-1] + (10 * s**3 - 15 * s**4 + 6 * s**5) * (goal - points[-1])
        rest = np.repeat(goal[None], max(1, round(dwell * fps)), axis=0)
        path += [way, rest]
        grasp += [np.full(len(way), holds[-1]), np.full(len(rest), float((number % 2 == 0) != arm.begins_closed))]
        points.append(goal)
        holds.append(float((number % 2 == 0) != arm.begins_closed))
    command = np.concatenate(path)
    tremor = np.cumsum(rng.normal(0, 1, command.shape), axis=0)
    window = max(3, round(0.3 * fps))
    kernel = np.ones(window) / window
    tremor = np.apply_along_axis(lambda x: np.convolve(x - np.convolve(x, kernel, "same"), kernel, "same"), 0, tremor)
    size = 0.003 if arm.space == "joint" else np.array([0.001] * 3 + [0.01] * 3)
    return command + size * tremor / np.sqrt(window), np.concatenate(grasp)


def points_at(rng: np.random.Generator, long: float) -> list[tuple[float, float]]:
    """(seconds of motion, seconds of rest) until `long` seconds are over."""
    out: list[tuple[float, float]] = []
    while sum(map(sum, out)) < long:
        out.append((rng.uniform(0.8, 2.0), rng.uniform(0.3, 1.0)))
    return out


def _follow(command: F64, share: float, latency: int) -> F64:
    """The state of a controller of the first order: each frame it goes `share` of what is left to the command of
    `latency` frames ago."""
    state = np.empty_like(command)
    state[0] = command[0]
    for t in range(len(command) - 1):
        state[t + 1] = state[t] + share * (command[max(t - latency, 0)] - state[t])
    return state


@dataclass(frozen=True)
class _Hand:
    """A gripper: 1 is open. `speed`, share of the range a frame; an object is met in `meets` of the grasps."""

    is_binary: bool
    speed: float
    meets: float
    gain: float
    offset: float

    @classmethod
    def draw(cls, rng: np.random.Generator, fps: float) -> _Hand:
        return cls(
            is_binary=bool(rng.random() < 0.5),
            speed=rng.uniform(2.0, 5.0) / fps,
            meets=rng.choice([0.0, 0.7, 0.9]),
            gain=rng.uniform(0.93, 1.0),
            offset=rng.uniform(0.0, 0.03),
        )

    def course(self, rng: np.random.Generator, grasp: F64) -> tuple[F64, F64]:
        """(command [L], measured width [L])."""
        told, width = np.empty(len(grasp)), np.empty(len(grasp))
        now, goal, stop = 1.0 - grasp[0], 1.0 - grasp[0], 0.0
        for t, holds in enumerate(grasp):
            if t == 0 or holds != grasp[t - 1]:
                stop = rng.uniform(0.1, 0.6) if holds and rng.random() < self.meets else 0.0
                goal = 1.0 - holds if self.is_binary else (rng.uniform(0.0, 0.05) if holds else rng.uniform(0.8, 1.0))
            before = told[t - 1] if t else now
            told[t] = goal if self.is_binary else before + np.clip(goal - before, -2 * self.speed, 2 * self.speed)
            now += float(np.clip(max(told[t], stop if holds else 0.0) - now, -self.speed, self.speed))
            width[t] = now
        return told, np.clip(self.offset + (self.gain - self.offset) * width + rng.normal(0, 0.002, len(grasp)), 0, 1)


def _action_path(arm: Arm, command: F64, measured: F64) -> F64:
    return command if arm.reference == "command" else np.roll(measured, -1, axis=0)


def _difference(arm: Arm, command: F64, measured: F64) -> F64:
    """[L, D] what the actions are where they are differences: of angles as they are, rotations as Euler angles or, with
    a frame, as vectors along their axes."""
    path = command if arm.reference == "command_delta" else measured
    step = np.diff(path, axis=0, append=path[-1:])
    if arm.frame is not None:
        turned = Rotation.from_euler("xyz", path[:, 3:])
        after = turned[[*range(1, len(path)), -1]]
        turn = turned.inv() * after if arm.frame == "tool" else after * turned.inv()
        way = turned.inv().apply(step[:, :3]) if arm.frame == "tool" else step[:, :3]
        step = np.column_stack([way, turn.as_rotvec()])
    if arm.reference == "scaled_delta":
        step = step / (3 * step.std(axis=0).clip(1e-6))
    if arm.unit == "deg":
        step = np.degrees(step) if arm.space == "joint" else np.column_stack([step[:, :3], np.degrees(step[:, 3:])])
    return step


def _written(arm: Arm, measured: F64) -> F64:
    """[L, D] the `measured` path in the source's unit and rotation format."""
    if arm.space == "joint":
        return np.degrees(measured) if arm.unit == "deg" else measured
    quaternion = _quaternion(measured[:, 3:])
    if arm.rotation in ("xyzw", "wxyz"):
        turned = quaternion if arm.rotation == "xyzw" else np.roll(quaternion, 1, axis=1)
    elif arm.rotation in ("euler", "euler_zyx"):
        turned = Rotation.from_quat(quaternion).as_euler("zyx" if arm.rotation == "euler_zyx" else "xyz")
        turned = np.degrees(turned) if arm.unit == "deg" else turned
    elif arm.rotation == "axis_angle":
        w = quaternion * np.where(quaternion[:, 3:] < 0, -1, 1)
        norm = np.linalg.norm(w[:, :3], axis=1, keepdims=True)
        turned = w[:, :3] / norm.clip(1e-9) * 2 * np.arctan2(norm, w[:, 3:])
    else:
        x, y, z, w = quaternion.T
        turned = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)], axis=1)
        second = np.stack([2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)], axis=1)
        turned = np.concatenate([turned, second], axis=1)
    return np.concatenate([measured[:, :3], turned], axis=1)


def _quaternion(euler: F64) -> F64:
    """[L, 4] x y z w of roll, pitch, yaw [L, 3]: Rz Ry Rx; continuous along the path."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(euler / 2).T, np.sin(euler / 2).T
    return np.stack(
        [
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
            cr * cp * cy + sr * sp * sy,
        ],
        axis=1,
    )


def _scaled(share: F64, ends: tuple[float, float]) -> F64:
    return ends[0] + (ends[1] - ends[0]) * share


def _names(arm: Arm, num: int) -> list[str]:
    if arm.space == "joint":
        return [*(f"joint_position[{i}]" for i in range(num)), "gripper_position[0]"]
    return [*(f"position[{i}]" for i in range(3)), *(f"rotation[{i}]" for i in range(num - 3)), "gripper_position[0]"]
