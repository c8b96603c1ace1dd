"""Small LeRobot datasets with the codecs, keyframe distances and file sizes that a benchmark asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from opentau_train.data.lerobot_writer import VIDEO_PATH, Episode, Feature, Layout, write_tables

H264 = {"preset": "veryfast", "crf": "26", "bf": "0", "threads": "1"}
AV1 = {"preset": "10", "crf": "30", "svtav1-params": "lp=1"}
FPS = 15


def grainy(num: int, size: tuple[int, int], seed: int) -> Iterable[NDArray[np.uint8]]:
    """`num` pictures [H, W, 3] of a drifting pattern with a camera's grain: real sensors are never still."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    grain = rng.normal(0.0, 4.0, (8, height, width, 1)).astype(np.float32)
    phase = rng.uniform(0, 6, 3)
    for i in range(num):
        waves = [128 + 60 * np.sin(x / 23 + phase[c] + i / 9) + 50 * np.cos(y / 17 - i / 13 + c) for c in range(3)]
        yield np.clip(np.stack(waves, -1) + grain[i % 8], 0, 255).astype(np.uint8)


def write_video(
    path: Path, frames: Iterable[NDArray[np.uint8]], codec: str, gop: int, options: Mapping[str, str]
) -> None:
    """Frame i is shown at i / `FPS` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = None
        for i, pixels in enumerate(frames):
            if stream is None:
                extra = {"g": str(gop), "keyint_min": str(gop)} if codec == "libx264" else {"g": str(gop)}
                stream = container.add_stream(codec, rate=FPS, options={**options, **extra})
                stream.height, stream.width, stream.pix_fmt = pixels.shape[0], pixels.shape[1], "yuv420p"
                stream.codec_context.gop_size = gop
                stream.codec_context.time_base = Fraction(1, FPS)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_dataset(
    root: Path,
    lengths: Sequence[int],
    *,
    size: tuple[int, int] = (180, 320),
    cameras: int = 2,
    codec: str = "libx264",
    gop: int = 2,
    options: Mapping[str, str] = H264,
    episodes_per_file: int = 4,
    frames: Iterable[NDArray[np.uint8]] | None = None,
) -> Path:
    """Write episodes of `lengths` frames, or find them written; `frames` are those of every video file, by default
    grainy ones."""
    if (root / "meta" / "info.json").is_file():
        return root
    rng = np.random.default_rng(0)
    names = [f"observation.images.cam{c}" for c in range(cameras)]
    features = {name: Feature("video", (*size, 3), ["height", "width", "channels"]) for name in names}
    features |= {"observation.state": Feature("float32", (7,)), "action": Feature("float32", (7,))}
    layout = Layout(features, FPS, "arm", 16, episodes_per_file, {})
    rows = [rng.normal(size=(n, 7)).cumsum(0).astype(np.float32) for n in lengths]
    columns = [{"observation.state": r, "action": r} for r in rows]
    episodes = [Episode("move", n, c) for n, c in zip(lengths, columns, strict=True)]
    for start in range(0, len(lengths), episodes_per_file):
        total = sum(lengths[start : start + episodes_per_file])
        for c, name in enumerate(names):
            path = VIDEO_PATH.format(video_key=name, chunk_index=0, file_index=start // episodes_per_file)
            pictures = grainy(total, size, 100 * start + c) if frames is None else frames
            write_video(root / path, pictures, codec, gop, options)
    write_tables(root, layout, episodes)
    return root
