"""Pictures of numbers, drawn with Pillow: small line plots in a grid, the same bytes on every machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 200, 130, 14
"""Pixels of a panel, and of the band around its curves that holds the texts."""
TRUE, PREDICTED, INK, FRAME = (30, 30, 30), (220, 60, 40), (70, 70, 70), (200, 200, 200)


@dataclass(frozen=True)
class Panel:
    """One dimension of one window: `place` and `name` as texts, `true` [N] and `predicted` [T] over the chunk's
    steps."""

    place: str
    name: str
    true: NDArray[np.float64]
    predicted: NDArray[np.float64]


def draw_panels(rows: Sequence[Sequence[Panel]]) -> NDArray[np.uint8]:
    """`[H, W, 3]` uint8: a row of panels for each row, the true curve black, the predicted one red."""
    image = Image.new("RGB", (WIDTH * max(map(len, rows)), (HEIGHT + MARGIN) * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            _draw_panel(draw, panel, c * WIDTH, r * (HEIGHT + MARGIN) + MARGIN)
        draw.text((4, r * (HEIGHT + MARGIN)), row[0].place, fill=INK)
    return np.asarray(image)


def as_json(rows: Sequence[Sequence[Panel]]) -> bytes:
    """The panels as a JSON list of `Panel`'s fields, for who draws them otherwise; what is no number is null."""

    def plain(values: NDArray[np.float64]) -> list[float | None]:
        return [value if np.isfinite(value) else None for value in values.tolist()]

    panels = [asdict(p) | {"true": plain(p.true), "predicted": plain(p.predicted)} for row in rows for p in row]
    return json.dumps(panels).encode()


def _draw_panel(draw: ImageDraw.ImageDraw, panel: Panel, left: int, top: int) -> None:
    draw.rectangle((left + 2, top + MARGIN, left + WIDTH - 4, top + HEIGHT - MARGIN), outline=FRAME)
    both = np.concatenate([panel.true, panel.predicted])
    finite = both[np.isfinite(both)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    span = max(high - low, 1e-9)
    draw.text((left + 4, top), panel.name, fill=INK)
    draw.text((left + 4, top + HEIGHT - MARGIN + 1), f"{low:.3g} .. {high:.3g}", fill=INK)
    steps = max(len(panel.predicted) - 1, 1)
    for curve, colour in ((panel.true, TRUE), (panel.predicted, PREDICTED)):
        x = left + 6 + np.arange(len(curve)) / steps * (WIDTH - 14)
        y = top + HEIGHT - MARGIN - 4 - (curve - low) / span * (HEIGHT - 2 * MARGIN - 8)
        points = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if np.isfinite(b)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2 if colour == TRUE else 1)
        for a, b in points:
            draw.ellipse((a - 1, b - 1, a + 1, b + 1), fill=colour)


def save_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write `[H, W, 3]` uint8 to `path`, whose directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
