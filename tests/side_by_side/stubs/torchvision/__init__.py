"""Stands in for torchvision, of which LeRobot's datasets use this much: its video reader on PyAV, and `ToTensor`.

What they give is as torchvision documents it (`torchvision.io.VideoReader` with the backend "pyav").
"""

import site
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch


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


class ToTensor:
    """A PIL image as [3, H, W] f32 in [0, 1]."""

    def __call__(self, image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).to(torch.float32) / 255


io = SimpleNamespace(VideoReader=VideoReader)
transforms = SimpleNamespace(ToTensor=ToTensor)

# What else is asked for (models, for ACT's backbone) is the real package's: its Python code runs without its compiled
# operators, which fit one build of torch only.
__path__ += [
    str(Path(entry) / "torchvision") for entry in site.getsitepackages() if (Path(entry) / "torchvision").is_dir()
]
