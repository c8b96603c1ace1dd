"""What the sample's cameras see: a table, a grey arm and one coloured ball, drawn with numpy.

Cameras are pinholes; pixels [H, W, 3] uint8 RGB. Everything is drawn into the slice that bounds it, which keeps a
frame well below a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Image = NDArray[np.uint8]

HEIGHT, WIDTH = 180, 320
BALL_RADIUS = 0.07
"""Metres: at least 12 pixels in the exterior cameras, so that it survives a resize to 64 x 64."""
COLOURS = {
    "red": (222, 32, 32),
    "green": (28, 176, 48),
    "blue": (36, 72, 230),
    "yellow": (238, 206, 24),
    "magenta": (214, 40, 200),
}

_FLOOR, _TABLE, _MARK = (92, 94, 98), (176, 172, 166), (150, 146, 140)
_LINKS = ((232, 232, 234), (206, 206, 210))
_FINGER = (58, 58, 62)
_TABLE_X, _TABLE_Y = (-0.25, 0.95), (-0.75, 0.75)
_LIGHT = (0.35, -0.45)  # of the ball's radius, from its centre to the bright spot, in pixels right and down
_ROWS = np.arange(4096, dtype=np.float32)[:, None]
_COLUMNS = np.arange(4096, dtype=np.float32)[None, :]


@dataclass(frozen=True)
class Camera:
    """A pinhole at `position` [3] m; the rows of `turn` [3, 3] are its right, down and forward axes in the base
    frame; `focal` in pixels."""

    position: Array
    turn: Array
    focal: float

    @staticmethod
    def looking(position: tuple[float, float, float], at: tuple[float, float, float], focal: float) -> Camera:
        forward = np.subtract(at, position) / np.linalg.norm(np.subtract(at, position))
        right = np.cross(forward, (0.0, 0.0, 1.0))
        right /= np.linalg.norm(right)
        return Camera(np.asarray(position, np.float64), np.stack([right, np.cross(forward, right), forward]), focal)

    def project(self, points: Array) -> Array:
        """`[P, 3]` m -> `[P, 3]`: column, row (pixels) and depth (m; at most 0 = behind the camera)."""
        seen = (points - self.position) @ self.turn.T
        depth = seen[:, 2:]
        pixels = self.focal * seen[:, :2] / np.maximum(depth, 1e-3) + (WIDTH / 2, HEIGHT / 2)
        return np.concatenate([pixels, depth], axis=1)


EXTERIOR = {
    "exterior_1_left": Camera.looking((1.1, 0.75, 1.05), (0.46, 0.02, 0.02), 295.0),
    "exterior_2_left": Camera.looking((1.1, -0.75, 1.05), (0.46, -0.02, 0.02), 295.0),
}
CAMERAS = ("wrist_left", *EXTERIOR)


@dataclass(frozen=True)
class World:
    """One instant: `chain` [8, 4, 4], the arm's poses (`arm.frames`); `opening` of the gripper in [0, 1]; `ball`,
    its centre [3] m, and `colour` (RGB)."""

    chain: Array
    opening: float
    ball: Array
    colour: tuple[int, int, int]


def backdrop(camera: Camera) -> Image:
    """What a fixed camera sees behind the arm and the ball: floor, table and its marks."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    rays = np.stack([(columns - WIDTH / 2) / camera.focal, (rows - HEIGHT / 2) / camera.focal, np.ones(rows.shape)], -1)
    rays = rays @ camera.turn
    hit = camera.position + rays * (-camera.position[2] / np.minimum(rays[..., 2:], -1e-6))
    x, y = hit[..., 0], hit[..., 1]
    on_table = (x > _TABLE_X[0]) & (x < _TABLE_X[1]) & (y > _TABLE_Y[0]) & (y < _TABLE_Y[1])
    on_mark = (np.minimum(x % 0.2, 0.2 - x % 0.2) < 0.004) | (np.minimum(y % 0.2, 0.2 - y % 0.2) < 0.004)
    image = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    image[:] = _FLOOR
    image[on_table] = _TABLE
    image[on_table & on_mark] = _MARK
    return image


_MARKS = np.array([(x, y, 0.0) for x in np.arange(-0.2, 1.0, 0.1) for y in np.arange(-0.7, 0.75, 0.1)])
"""Dots that move past the hand's camera."""


def render_exterior(camera: Camera, background: Image, world: World) -> Image:
    """A fixed camera's frame over its `backdrop`."""
    image = background.copy()
    joints = world.chain[:, :3, 3]
    base = np.zeros((1, 3))
    # The elbow's and the wrist's offsets make the links' corners; equal neighbours draw nothing.
    corners = np.concatenate([base, joints[[0, 2, 3, 4, 6]], joints[6:7] + 0.107 * world.chain[6, :3, 2]])
    segments = [(corners[i], corners[i + 1], 0.055 if i < 4 else 0.045, _LINKS[i % 2]) for i in range(len(corners) - 1)]
    segments += [(*finger, 0.014, _FINGER) for finger in _fingers(world)]
    ball_depth = camera.project(world.ball[None])[0, 2]
    ends = camera.project(np.array([end for segment in segments for end in segment[:2]])).reshape(-1, 2, 3)
    depths = ends[:, :, 2].mean(axis=1)
    drawn = False
    for i in np.argsort(-depths, kind="stable"):
        if not drawn and depths[i] < ball_depth:
            _draw_ball(image, camera, world)
            drawn = True
        _draw_segment(image, ends[i], segments[i][2] * camera.focal / depths[i], segments[i][3])
    if not drawn:
        _draw_ball(image, camera, world)
    return image


def render_wrist(world: World) -> Image:
    """The frame of the camera on the hand, which looks along the fingers."""
    tool = world.chain[-1]
    right, down, forward = tool[:3, 1], -tool[:3, 0], tool[:3, 2]
    camera = Camera(tool[:3, 3] - 0.16 * forward - 0.07 * down, np.stack([right, down, forward]), 150.0)
    image = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    image[:] = _TABLE
    marks = camera.project(_MARKS)
    inside = (marks > (0, 0, 0.02)).all(axis=1) & (marks[:, :2] < (WIDTH, HEIGHT)).all(axis=1)
    for column, row, depth in marks[inside].tolist():
        half = max(1, int(0.006 * camera.focal / depth))
        _box(image, row - half, row + half + 1, column - half, column + half + 1)[:] = _MARK
    _draw_ball(image, camera, world)
    for finger in _fingers(world):
        ends = camera.project(np.array(finger))
        _draw_segment(image, ends, 0.014 * camera.focal / ends[:, 2].mean(), _FINGER)
    return image


def _fingers(world: World) -> list[tuple[Array, Array]]:
    tool = world.chain[-1]
    tips = tool[:3, 3] + np.array([[-1.0], [1.0]]) * (0.012 + 0.04 * world.opening) * tool[:3, 1]
    return [(tip - 0.1 * tool[:3, 2], tip) for tip in tips]


def _box(image: Image, top: float, bottom: float, left: float, right: float) -> Image:
    """The image's part inside the given rows and columns (a view; empty when outside)."""
    top, left = max(0, int(top)), max(0, int(left))
    return image[top : max(top, int(bottom)), left : max(left, int(right))]


def _draw_ball(image: Image, camera: Camera, world: World) -> None:
    column, row, depth = camera.project(world.ball[None])[0]
    if depth < 0.05:
        return
    radius = camera.focal * BALL_RADIUS / depth
    colour = np.array(world.colour)
    _draw_disc(image, row, column, radius, colour)
    _draw_disc(image, row + _LIGHT[1] * radius, column + _LIGHT[0] * radius, 0.3 * radius, colour + (255 - colour) // 3)


def _draw_disc(image: Image, row: float, column: float, radius: float, colour: NDArray) -> None:
    top, left = max(0, int(row - radius)), max(0, int(column - radius))
    part = _box(image, top, row + radius + 2, left, column + radius + 2)
    height, width = part.shape[:2]
    if height and width:
        rows, columns = _ROWS[:height] + (top - row), _COLUMNS[:, :width] + (left - column)
        part[rows * rows + columns * columns < radius * radius] = colour


def _draw_segment(image: Image, ends: Array, radius: float, colour: tuple[int, int, int]) -> None:
    """A thick line with round ends between two projected points [2, 3]."""
    if ends[:, 2].min() < 0.02:
        return
    (left, top), (right, bottom) = ends[:, :2].min(axis=0) - radius, ends[:, :2].max(axis=0) + radius
    top, left = max(0, int(top)), max(0, int(left))
    part = _box(image, top, bottom + 2, left, right + 2)
    height, width = part.shape[:2]
    if not (height and width):
        return
    start, along = ends[0, :2], ends[1, :2] - ends[0, :2]
    rows = _ROWS[:height] + np.float32(top - start[1])
    columns = _COLUMNS[:, :width] + np.float32(left - start[0])
    length2 = max(float(along @ along), 1e-6)
    share = rows * np.float32(along[1] / length2) + columns * np.float32(along[0] / length2)
    np.clip(share, 0.0, 1.0, out=share)
    rows = rows - share * np.float32(along[1])
    columns = columns - share * np.float32(along[0])
    part[rows * rows + columns * columns < np.float32(radius * radius)] = colour
