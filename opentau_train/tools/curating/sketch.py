"""A policy's gradient in a few thousand numbers that keep inner products: a keyed CountSketch.

Each parameter's element is added, with a keyed sign, to one of m buckets (Charikar, Chen and Farach-Colton 2002;
Weinberger et al. 2009). Inner products of two sketches are unbiased estimates of the gradients' own, so that cosines
have a standard error of about (1 - cosine^2) / sqrt(m), that of a correlation over m samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from opentau_train import rng

_AT_ONCE = 1 << 24
"""Elements whose buckets are drawn at a time."""


class Sketch:
    """Sketches the gradients of the `trained` parameters of one policy, all by the same hash of `seed`, the parameter's
    name and the element's place: on any device and machine the same buckets and signs."""

    def __init__(self, policy: nn.Module, num_buckets: int, seed: int = 0):
        self.num_buckets = num_buckets
        self.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._places = {
            name: torch.from_numpy(places(rng.key(seed, "sketch", name), p.numel(), num_buckets)).to(p.device)
            for name, p in self.trained.items()
        }

    def of_gradient(self) -> torch.Tensor:
        """[num_buckets] float32 on the CPU, of the `grad` of all parameters; no `grad` is zero."""
        halves: torch.Tensor | None = None
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                if halves is None:
                    halves = torch.zeros(2 * self.num_buckets, device=parameter.device)
                halves.index_add_(0, self._places[name], parameter.grad.detach().reshape(-1).float())
        if halves is None:
            return torch.zeros(self.num_buckets)
        return (halves[: self.num_buckets] - halves[self.num_buckets :]).cpu()


def places(key: int, num: int, num_buckets: int) -> np.ndarray:
    """[num] int32 in [0, 2 num_buckets): each element's bucket, in the second half where its sign is minus."""
    out = np.empty(num, np.int32)
    for start in range(0, num, _AT_ONCE):
        stop = min(start + _AT_ONCE, num)
        out[start:stop] = rng.fold(key, np.arange(start, stop)) % np.uint64(2 * num_buckets)
    return out


def cosine_error(cosine: np.ndarray, num_buckets: int) -> np.ndarray:
    """The standard error that the sketch adds to a cosine."""
    return (1.0 - np.square(cosine)) / np.sqrt(num_buckets)
