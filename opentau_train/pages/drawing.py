"""Drawings as SVG, without a script, with axes that have names and round numbers: lines, and bars of a histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from opentau_train.pages.document import Html

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


@dataclass(frozen=True)
class Frame:
    """The axes of a drawing: what they are called, from where to where they reach, how large it is in pixels, and how
    many rules across it has at most."""

    x_name: str
    y_name: str
    x: tuple[float, float]
    y: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT
    num_ticks: int = 4

    def across(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - LEFT - RIGHT)

    def down(self, y: float) -> float:
        return self.height - BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.height - TOP - BOTTOM)

    def figure(self, parts: Sequence[str]) -> Html:
        """The drawing of `parts` above the rules and numbers of its axes."""
        made = []
        for tick in ticks(*self.y, self.num_ticks):
            y = self.down(tick)
            made.append(f'<line class="rule" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            made.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
        for tick in ticks(*self.x, max(2, self.width // 70)):
            place = f'x="{self.across(tick):.1f}" y="{self.height - BOTTOM + 14}"'
            made.append(f'<text {place} text-anchor="middle">{tick:.6g}</text>')
        middle = (LEFT + self.width - RIGHT) / 2
        names = f'<text x="{middle}" y="{self.height - 4}" text-anchor="middle">{escape(self.x_name)}</text>'
        names += f'<text x="{LEFT}" y="12">{escape(self.y_name)}</text>'
        label = escape(f"{self.y_name} over {self.x_name}", quote=True)
        svg = f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{label}">'
        return Html(f"<figure>{svg}{''.join([*made, *parts, names])}</svg></figure>")


def plot(lines: Sequence[Line], x_name: str, y_name: str, lowest: float | None = None) -> Html:
    """A figure of lines with at least one point. `lowest`: where the y axis begins at the latest."""
    ys = np.concatenate([line.y for line in lines])
    ys = ys if lowest is None else np.append(ys, lowest)
    frame = Frame(x_name, y_name, _bounds(np.concatenate([line.x for line in lines])), _bounds(ys))
    parts = []
    for line in lines:
        pairs = zip(line.x.tolist(), line.y.tolist(), strict=True)
        points = [(frame.across(x), frame.down(y)) if x == x and y == y else None for x, y in pairs]
        parts.append(f'<path class="{line.kind}" d="{_path(points)}"/>')
        if line.dot and points and points[0] is not None:
            parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.2"/>')
    return frame.figure(parts)


def histogram(
    counts: NDArray, edges: NDArray, x_name: str, y_name: str, marks: Sequence[float] = (), width: int = WIDTH
) -> Html:
    """A figure of bars `counts` [N] between the `edges` [N+1]; each says its range and number to who points at it. The
    `marks` are places on the x axis, those outside it at its end."""
    height = 150 if width < WIDTH else HEIGHT
    low, high = _bounds(np.asarray(edges, float))
    most = max(1, int(counts.max(initial=0)))
    frame = Frame(x_name, y_name, (low, high), (0.0, float(most)), width, height, min(4, most))
    parts = []
    for count, left, right in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            x, y = frame.across(left), frame.down(count)
            size = f'width="{max(frame.across(right) - x - 0.5, 0.8):.1f}" height="{frame.down(0) - y:.1f}"'
            told = f"<title>{left:.4g} to {right:.4g}: {count:,.0f}</title>"
            parts.append(f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" {size}>{told}</rect>')
    for mark in marks:
        x = frame.across(min(max(mark, low), high))
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{height - BOTTOM}" y2="{height - BOTTOM - 8}">'
            f"<title>{mark:.4g}</title></line>"
        )
    return frame.figure(parts)


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
