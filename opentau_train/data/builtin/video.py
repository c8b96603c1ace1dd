"""How a camera's pictures are stored in a LeRobot dataset: as mp4 files of any codec, or as PNG in the rows."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

GOP = 10
X264 = {"crf": "26", "preset": "ultrafast", "threads": "1", "keyint_min": f"{GOP}", "bf": "0", "sc_threshold": "0"}
"""No reordered frames, a key frame every `GOP`, and one thread: x264's result depends on the number of threads."""


@dataclass(frozen=True)
class Camera:
    """Pictures of `size` [H, W] and how they are stored: as PNG in the rows where `codec` is None, or else in mp4
    files by FFmpeg's encoder of that name with its `options`, a key frame every `gop`. `shift_s`: the time of each
    file's first frame; `ticks` of its clock a second, None = fps; `colour`: (range, space) as FFmpeg numbers them."""

    codec: str | None
    size: tuple[int, int]
    gop: int = GOP
    options: Mapping[str, str] = field(default_factory=dict)
    episodes_per_file: int = 1
    shift_s: float = 0.0
    pix_fmt: str = "yuv420p"
    ticks: int | None = None
    colour: tuple[int, int] | None = None

    def describe(self, fps: int) -> dict[str, Any]:
        """The JSON of this camera among info.json's `features`."""
        entry = {"dtype": "image", "shape": [*self.size, 3], "names": ["height", "width", "channels"]}
        if self.codec is None:
            return entry
        info = {
            "video.height": self.size[0],
            "video.width": self.size[1],
            "video.codec": av.Codec(self.codec, "w").canonical_name,
            "video.pix_fmt": self.pix_fmt,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
            "is_depth_map": False,
        }
        return entry | {"dtype": "video", "info": info}


def png(pixels: NDArray) -> bytes:
    """The pixels ([H, W], or [H, W, 3]) as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_video(path: Path, camera: Camera, fps: int, frames: Iterable[tuple[int, NDArray[np.uint8]]]) -> None:
    """The camera's mp4 of (tick of its clock, `[H, W, 3]` uint8 RGB) pairs: `enumerate(pictures)` is i / fps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ticks = fps if camera.ticks is None else camera.ticks
    assert camera.codec is not None, "pictures in the rows have no mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(camera.codec, rate=fps, options={"g": str(camera.gop), **camera.options})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *camera.size, camera.pix_fmt
        encoder, stream.time_base = stream.codec_context, Fraction(1, ticks)
        encoder.gop_size, encoder.time_base = camera.gop, Fraction(1, ticks)
        if camera.colour is not None:
            encoder.color_range, encoder.colorspace = camera.colour
            encoder.color_primaries = encoder.color_trc = 1
        encoder.open()
        if camera.codec == "libsvtav1" and sys.platform == "linux":
            # As root, SVT-AV1 gives the thread that opens it, and all that this starts, a real-time priority: they
            # would keep every other process from the processor.
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        for tick, pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
