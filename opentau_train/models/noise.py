"""The flow's noise and time, keyed by sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opentau_train import rng
from opentau_train.types import Noise


def draw_noise(key: torch.Tensor, draw: int, shape: Sequence[int]) -> Noise:
    """The flow's noise [B, T, A] and time [B] of samples with random keys `key` [B] i64: functions of (key, draw).

    `shape` is (T, A). Made on the CPU in NumPy, so that no device, batch or order changes a number.
    """
    keys = rng.fold(key.cpu().numpy().view(np.uint64), draw)
    steps, dims = shape
    noise = rng.normal(rng.fold(keys, 1), steps * dims).reshape(-1, steps, dims)
    time = rng.uniform(rng.fold(keys, 2))[:, 0].astype(np.float32)
    # float32 rounds the largest uniforms up to 1.0, which is outside the half-open range that policies rely on.
    time = np.minimum(time, np.nextafter(np.float32(1), np.float32(0)))
    return Noise(torch.from_numpy(noise).to(key.device), torch.from_numpy(time).to(key.device))
