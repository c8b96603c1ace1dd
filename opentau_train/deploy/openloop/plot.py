"""A plot of lines as SVG, with axes that have names and round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 560, 200
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 20, 36
"""Pixels around the lines, for the axes' numbers and names."""


@dataclass(frozen=True)
class Line:
    """Points (x, y) of one kind, a class of the page's style; NaN is a gap; `dot`: its first point is one."""

    kind: str
    x: NDArray
    y: NDArray
    dot: bool = False


def plot(lines: Sequence[Line], x_name: str, y_name: str, lowest: float | None = None) -> str:
    """A figure of lines with at least one point. `lowest`: where the y axis begins at the latest."""
    x_low, x_high = _bounds(np.concatenate([line.x for line in lines]))
    ys = np.concatenate([line.y for line in lines])
    y_low, y_high = _bounds(ys if lowest is None else np.append(ys, lowest))

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks(y_low, y_high, 4):
        y = down(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in ticks(x_low, x_high, 8):
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{tick:.6g}</text>')
    for line in lines:
        points = [(across(x), down(y)) if x == x and y == y else None for x, y in zip(line.x.tolist(), line.y.tolist())]
        parts.append(f'<path class="{line.kind}" d="{_path(points)}"/>')
        if line.dot and points and points[0] is not None:
            parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.2"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(f'<text x="{LEFT}" y="12">{escape(y_name)}</text>')
    label = escape(f"{y_name} over {x_name}", quote=True)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Up to `most` + 1 round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _bounds(values: NDArray) -> tuple[float, float]:
    """The smallest and the largest number, apart even where there is one only."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    apart = high - low
    if apart <= 1e-9 * max(abs(low), abs(high)):
        apart = max(abs(low), abs(high), 1.0) * 0.1
        return low - apart, high + apart
    return low, high


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """SVG's words for lines from point to point; None begins anew."""
    words, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        words.append(f"{pen}{point[0]:.1f},{point[1]:.1f}")
        pen = "L"
    return "".join(words)
