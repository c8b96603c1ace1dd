"""How large a picture becomes. Apart from decoding, so that a robot needs no library for videos."""

from __future__ import annotations


def fit(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the largest picture of the same aspect ratio inside `size` (H, W), at least one pixel each
    way."""
    scale = min(size[0] / height, size[1] / width)
    return min(size[0], max(1, round(height * scale))), min(size[1], max(1, round(width * scale)))
