"""How far a dataset's clocks of rows and of videos are apart, and the setting that allows for it."""

from __future__ import annotations

import numpy as np

from opentau_train.data.decode.parquet import RowError
from opentau_train.data.decode.video_file import VideoError
from opentau_train.data.lerobot.cursor import LeRobotCursorFactory
from opentau_train.data.lerobot.rows import Reading
from opentau_train.data.lerobot.spans import enough
from opentau_train.types import WindowSpec


def proposed_tolerance(reading: Reading) -> str | None:
    """The `tolerance_s` that takes every frame of the first, last and longest episodes, where the present one doesn't
    and their clocks, not missing frames, are the reason. Reads these episodes' rows and the times of their frames."""
    cursor, worst = LeRobotCursorFactory(reading, WindowSpec(chunk_length=1)).cursor(), 0.0
    for position in {0, len(reading.episodes) - 1, int(np.argmax(reading.episodes.length))}:
        try:
            worst = max(worst, cursor.drift_of(position))
        except (RowError, VideoError):
            continue  # a training names what it can't read
    cursor.close()
    return enough(worst) if worst > 0 else None
