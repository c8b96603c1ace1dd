"""Random numbers that a policy draws for the samples of a batch, each a pure function of what it is for.

A number depends on the sample's key, the draw's index and name, and its place in the draw's shape: not on the device,
the rank, the batch that the sample stands in, or any generator's state. The generator is counter-based:

    key     = SplitMix64's finaliser of (sample key xor hash of (index, name)), 64 bits: (low, high)
    x       = counter + low
    x       = (x ^ x >> 16) * 0x21f0aaad + high
    x       = (x ^ x >> 15) * 0x735a2d97
    bits    = x ^ x >> 15                          all modulo 2^32

the two-round integer hash of C. Wellons' and T. Ettinger's search for least bias ("hash-prospector"), with the key's
second half put in between. It runs in ordinary tensor operations on the device that the keys are on, so nothing is
drawn on one device and sent to another, and no key is read back.

Normal numbers are the normal distribution's quantiles, by a table that is linear between 256 points an octave of the
tail's probability. Cosines and logarithms differ in their last bit from device to device, and on a CPU with an
element's place in the tensor; integer operations, a look-up, one product and one sum don't.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from opentau_train import rng

BITS = 24
"""Random bits of a uniform number: as many as a float32's mantissa holds."""
OCTAVE = 256
"""Points of the normal table for each octave of the tail's probability."""
ACTION_DRAW = 1 << 20
"""The index of the draws for sampling actions, which no draw of the loss has."""
_FRACTION = 23 - OCTAVE.bit_length() + 1  # bits of a float32's mantissa below the table's points
_FIRST_CELL = (127 - BITS) * OCTAVE  # the upper bits of the smallest probability, 2^-BITS, as a float32
_WORD = 2**32 - 1


class Draws:
    """The draws of one batch: `keys` [B] int64, the samples' keys (`Batch.key`), on the device where they are wanted.

    `index` tells several draws for the same batch apart. What is drawn under one name and shape is always the same:
    give each use a name of its own.
    """

    def __init__(self, keys: Tensor, index: int = 0):
        self.keys, self.index = keys, index

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] float32, standard normal; the largest magnitude is 5.4, which one number in 2^24 has."""
        bits = self.bits(name, shape).flatten()
        values, slopes = _normal_table(bits.device)
        # In place wherever it can be: on a CPU most of the time would go into fresh memory otherwise.
        tail = _top(bits).add_(1).to(torch.float32).mul_(2.0**-BITS)  # probability of a larger magnitude, in (0, 1]
        place = tail.view(torch.int32)
        cell = (place >> _FRACTION).sub_(_FIRST_CELL)
        share = place.bitwise_and_((1 << _FRACTION) - 1).to(torch.float32).mul_(2.0**-_FRACTION)
        # `index_select` takes a quarter of what `values[cell]` does.
        magnitude = torch.index_select(slopes, 0, cell, out=tail).mul_(share)
        magnitude.add_(torch.index_select(values, 0, cell, out=share))
        return magnitude.copysign_(bits.bitwise_left_shift_(31).view(torch.float32)).view(-1, *shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] float32 in [0, 1): multiples of 2^-24, all equally likely."""
        return _top(self.bits(name, shape)).to(torch.float32).mul_(2.0**-BITS)

    def choice(self, name: str, num: int, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] int64 in [0, num), for `num` up to 2^24: floor(uniform * num), each within 2^-24 of even."""
        return (_top(self.bits(name, shape)).to(torch.int64) * num) >> BITS

    def bits(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] int32: 32 random bits each."""
        low, high = self._halves(name)
        counter = torch.arange(math.prod(shape), dtype=torch.int32, device=low.device)
        x = counter + low[:, None]
        shifted = torch.empty_like(x)
        _xor_shift(x, 16, shifted)
        x.mul_(0x21F0AAAD).add_(high[:, None])
        _xor_shift(x, 15, shifted)
        x.mul_(0x735A2D97)
        return _xor_shift(x, 15, shifted).view(len(x), *shape)

    def _halves(self, name: str) -> tuple[Tensor, Tensor]:
        """[B] int32 twice: the key of the draws of that name."""
        key = mix(self.keys ^ _signed(rng.key("draws", self.index, name)))
        low = key & _WORD
        return (low - ((low >> 31) << 32)).to(torch.int32), (key >> 32).to(torch.int32)


FlowTime = Literal["uniform", "beta", "logit_normal"]


def flow_time(draws: Draws, distribution: FlowTime) -> Tensor:
    """[B] float32, the share of noise at which a flow is trained, in (0, 1).

    `beta`: Beta(1.5, 1) scaled to 0.001 + 0.999 x, more often near the noise, as pi0's (Black et al. 2024, appendix B,
    where 1 - t has this density); `logit_normal`: the sigmoid of a standard normal number (Esser et al. 2024).
    """
    if distribution == "logit_normal":
        return torch.sigmoid(draws.normal("time"))
    time = draws.uniform("time")
    return time if distribution == "uniform" else 0.999 * time ** (2 / 3) + 0.001


def _xor_shift(x: Tensor, by: int, shifted: Tensor) -> Tensor:
    """x ^= x >> by, in place, for 32 bits; `shifted` is memory to work in."""
    torch.bitwise_right_shift(x, by, out=shifted)
    return x.bitwise_xor_(
        shifted.bitwise_and_((1 << (32 - by)) - 1)
    )  # the shift is arithmetic, the mask makes it logical


def _top(bits: Tensor) -> Tensor:
    """The upper 24 of 32 bits, as int32."""
    return (bits >> (32 - BITS)).bitwise_and_((1 << BITS) - 1)


def mix(x: Tensor) -> Tensor:
    """`rng.mix` in int64 tensors: the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(word: int) -> int:
    """The int64 with the bits of a uint64."""
    return word - 2**64 if word >= 2**63 else word


@cache
def _normal_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """(values, slopes) [BITS * 256 + 1] float32: the magnitudes whose two tails have the probability p = 2^(octave)
    times (1 + point / 256), and the difference to the next one."""
    quantile = NormalDist().inv_cdf
    octaves = (2.0 ** (octave - BITS) for octave in range(BITS))
    tails = [base * (1 + point / OCTAVE) for base in octaves for point in range(OCTAVE)]
    values = torch.tensor([*(-quantile(tail / 2) for tail in tails), 0.0], dtype=torch.float64)
    slopes = torch.cat([values.diff(), torch.zeros(1, dtype=torch.float64)])
    return values.to(device, torch.float32), slopes.to(device, torch.float32)
