"""Episodes as a recording for the Rerun viewer: pictures, states, actions and tasks, over frames and over time."""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opentau_train.data.lint.reading import chosen_episodes
from opentau_train.data.mixture.mixture import Dataset, Mixture
from opentau_train.errors import BadSample, UserError
from opentau_train.tools.inspecting.looking import MOST_SOURCES
from opentau_train.types import WindowSpec

MOST_FRAMES = 600
"""Of an episode that are recorded; of a longer one every second, third, ..."""
SIZE = (240, 320)
"""(H, W) that pictures fit into."""


def record(mixture: Mixture, num: int, out: Path) -> int:
    """Write `num` episodes of each source to `out`; how many they are. Raises `UserError` where rerun-sdk is missing,
    and OSError."""
    try:
        import rerun
    except ImportError as error:
        raise UserError(
            "a recording needs rerun-sdk, which is not installed",
            where="--rerun",
            remedy='pip install "opentau_train[rerun]" (or: pip install rerun-sdk)',
        ) from error
    out.touch()  # Rerun's own error for a place that can't be written is none that is told
    stream = rerun.RecordingStream("opentau_train")
    stream.save(str(out))
    total = 0
    for dataset in mixture.datasets[:MOST_SOURCES]:
        for position in chosen_episodes(dataset.source, num).tolist()[:num]:
            _record(rerun, stream, dataset, position)
            total += 1
    stream.flush()
    stream.disconnect()
    return total


def _record(rerun: Any, stream: Any, dataset: Dataset, position: int) -> None:
    """One episode, below `DATASET/episode_N`."""
    source, number = dataset.source, int(dataset.source.episodes.episode_index[position])
    path, length = [dataset.name, f"episode_{number:06d}"], int(source.episodes.length[position])
    for vector, names in (("state", source.state_names), ("actions", source.action_names)):
        if names:
            stream.log([*path, vector], rerun.SeriesLines(names=list(names)), static=True)
    factory = source.cursors(WindowSpec(chunk_length=1, image_size=SIZE))
    with closing(factory), closing(factory.cursor()) as cursor:
        for frame in range(0, length, -(-length // MOST_FRAMES)):
            stream.set_time("frame", sequence=frame)
            stream.set_time("time", duration=frame / source.fps)
            try:
                window = cursor.read(position, frame)
            except BadSample as error:
                stream.log([*path, "unreadable"], rerun.TextLog(error.cause))
                continue
            if window.prompts:
                stream.log([*path, "task"], rerun.TextDocument(window.prompts[0]))
            for camera, images in window.images.items():
                picture = rerun.EncodedImage(contents=_jpeg(images[-1]), media_type="image/jpeg")
                stream.log([*path, "cameras", camera], picture)
            for vector, values in (("state", window.state), ("actions", window.actions[0])):
                if len(values):
                    stream.log([*path, vector], rerun.Scalars(values.astype(np.float64)))


def _jpeg(pixels: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=85)
    return content.getvalue()
