"""A seven-joint arm as numpy: forward and inverse kinematics. The chain is a Franka Panda's.

Lengths in metres, angles in radians; N configurations at once. The base stands at the origin, x points forward and
z up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_JOINTS = 7
HOME = np.array([0.0, -np.pi / 5, 0.0, -4 * np.pi / 5, 0.0, 3 * np.pi / 5, 0.0])
"""[7] rad: where DROID's episodes start."""

# Modified Denavit-Hartenberg rows (a, d, alpha) of joints 1..7 (Franka's documentation), then the tool's point.
_DH = np.array(
    [
        (0.0, 0.333, 0.0),
        (0.0, 0.0, -np.pi / 2),
        (0.0, 0.316, np.pi / 2),
        (0.0825, 0.0, np.pi / 2),
        (-0.0825, 0.384, -np.pi / 2),
        (0.0, 0.0, np.pi / 2),
        (0.088, 0.0, np.pi / 2),
    ]
)
_TOOL_LENGTH = 0.107 + 0.1034


def frames(joints: Array) -> Array:
    """`[N, 7]` joint angles -> `[N, 8, 4, 4]` poses in the base frame: joint i's at i, the tool's last.

    A joint turns about the z axis of its own frame.
    """
    joints = np.asarray(joints, np.float64)
    poses = np.empty((len(joints), NUM_JOINTS + 1, 4, 4))
    pose = np.broadcast_to(np.eye(4), (len(joints), 4, 4))
    for joint, (a, d, alpha) in enumerate(_DH):
        c, s = np.cos(joints[:, joint]), np.sin(joints[:, joint])
        ca, sa = np.cos(alpha), np.sin(alpha)
        zero, one = np.zeros_like(c), np.ones_like(c)
        step = np.array(
            [
                [c, -s, zero, a * one],
                [s * ca, c * ca, -sa * one, -d * sa * one],
                [s * sa, c * sa, ca * one, d * ca * one],
                [zero, zero, zero, one],
            ]
        ).transpose(2, 0, 1)
        pose = pose @ step
        poses[:, joint] = pose
    poses[:, -1] = pose
    poses[:, -1, :3, 3] += _TOOL_LENGTH * pose[:, :3, 2]
    return poses


def rotation(rpy: Array) -> Array:
    """`[N, 3]` roll, pitch, yaw -> `[N, 3, 3]`: Rz(yaw) Ry(pitch) Rx(roll)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy).T, np.sin(rpy).T
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    ).transpose(2, 0, 1)


def cartesian(joints: Array) -> Array:
    """`[N, 7]` -> `[N, 6]`: the tool's x, y, z (m) and roll, pitch, yaw (rad).

    Roll lies in [0, 2 pi): the hand points down, so that in (-pi, pi] it would jump between the two ends.
    """
    tool = frames(joints)[:, -1]
    turn = tool[:, :3, :3]
    roll = np.arctan2(turn[:, 2, 1], turn[:, 2, 2]) % (2 * np.pi)
    pitch = np.arcsin(np.clip(-turn[:, 2, 0], -1.0, 1.0))
    yaw = np.arctan2(turn[:, 1, 0], turn[:, 0, 0])
    return np.column_stack([tool[:, :3, 3], roll, pitch, yaw])


def reach(poses: Array, *, num_steps: int = 30, damping: float = 0.02, posture: float = 0.1) -> Array:
    """`[N, 6]` tool poses (as `cartesian` gives them) -> `[N, 7]` joints that bring the tool there.

    Damped least squares from `HOME` with a fixed number of steps and a pull towards `HOME` in the null space: a
    deterministic, smooth function of the pose. Assumes that the poses can be reached; it doesn't raise otherwise.
    """
    goal, turn = poses[:, :3], rotation(poses[:, 3:])
    joints = np.tile(HOME, (len(poses), 1))
    eye = np.eye(NUM_JOINTS)
    for _ in range(num_steps):
        chain = frames(joints)
        tool = chain[:, -1]
        axes = chain[:, :NUM_JOINTS, :3, 2]
        arms = tool[:, None, :3, 3] - chain[:, :NUM_JOINTS, :3, 3]
        jacobian = np.concatenate([np.cross(axes, arms), axes], axis=2).transpose(0, 2, 1)
        # Sum of the axes' cross products: to first order the rotation vector from the tool's turn to the goal's.
        lean = 0.5 * np.cross(tool[:, :3, :3], turn, axis=1).sum(axis=2)
        error = np.concatenate([goal - tool[:, :3, 3], lean], axis=1)[..., None]
        damped = jacobian @ jacobian.transpose(0, 2, 1) + damping**2 * np.eye(6)
        inverse = jacobian.transpose(0, 2, 1) @ np.linalg.inv(damped)
        home = posture * (HOME - joints)[..., None]
        joints = joints + (inverse @ error + (eye - inverse @ jacobian) @ home)[..., 0]
    return joints
