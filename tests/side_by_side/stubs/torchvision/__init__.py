"""Stands in for torchvision and lends its Python code the name: that runs without its compiled operators, which fit one
build of torch only.

The video reader, which newer releases lack, is one on PyAV that does what torchvision documents (`io.VideoReader` with
the backend "pyav").
"""

import site
from pathlib import Path

import av
import torch

__path__ += [str(folder) for entry in site.getsitepackages() if (folder := Path(entry) / "torchvision").is_dir()]

from torchvision import io, transforms  # noqa: E402, F401  the real package's


def set_video_backend(backend: str) -> None:
    assert backend == "pyav", backend


class VideoReader:
    """Frames {"data": [3, H, W] uint8 RGB, "pts": seconds} of a file, from where `seek` leads."""

    def __init__(self, path: str, stream: str = "video"):
        assert stream == "video", stream
        self.container = av.open(path, metadata_errors="ignore")
        self._frames = self.container.decode(video=0)

    def seek(self, seconds: float, keyframes_only: bool = False) -> None:
        self.container.seek(int(seconds / 1e-6), any_frame=not keyframes_only)
        self._frames = self.container.decode(video=0)

    def __iter__(self):
        for frame in self._frames:
            pixels = torch.as_tensor(frame.to_rgb().to_ndarray())
            yield {"data": pixels.permute(2, 0, 1), "pts": float(frame.pts * frame.time_base)}


io.VideoReader = VideoReader
