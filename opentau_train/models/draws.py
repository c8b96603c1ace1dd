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
PIECE = 1 << 18
"""Normal numbers that are made at a time on a CPU: with what they need, four megabytes."""
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
        low, high, counter = self._begin(name, shape)
        normal = torch.empty(len(low), len(counter), device=low.device)
        # On a CPU a piece that stays in the cache at a time: most of the time would go into fresh memory otherwise.
        rows = len(low) if low.device.type != "cpu" else max(1, PIECE // max(1, len(counter)))
        scratch = torch.empty(3, min(rows, len(low)), len(counter), dtype=torch.int32, device=low.device)
        for piece, first, second in zip(normal.split(rows), low.split(rows), high.split(rows), strict=True):
            _write_bits(piece.view(torch.int32), first, second, counter, scratch[0, : len(piece)])
            _make_normal(piece.view(-1), scratch[:, : len(piece)].flatten(1))
        return normal.view(len(low), *shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] float32 in [0, 1): multiples of 2^-24, all equally likely."""
        return _top(self.bits(name, shape)).to(torch.float32).mul_(2.0**-BITS)

    def choice(self, name: str, num: int, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] int64 in [0, num), for `num` up to 2^24: floor(uniform * num), each within 2^-24 of even."""
        return (_top(self.bits(name, shape)).to(torch.int64) * num) >> BITS

    def bits(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] int32: 32 random bits each."""
        low, high, counter = self._begin(name, shape)
        x = torch.empty(len(low), len(counter), dtype=torch.int32, device=low.device)
        _write_bits(x, low, high, counter, torch.empty_like(x))
        return x.view(len(low), *shape)

    def _begin(self, name: str, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """[B] int32 twice: the key of the draws of that name; and the places in `shape`, flat, int32."""
        key = mix(self.keys ^ _signed(rng.key("draws", self.index, name)))
        low, places = key & _WORD, torch.arange(math.prod(shape), dtype=torch.int32, device=key.device)
        return (low - ((low >> 31) << 32)).to(torch.int32), (key >> 32).to(torch.int32), places


FlowTime = Literal["uniform", "beta", "logit_normal", "heavy_tailed"]
_HEAVY_TAILS = 1.29


def flow_time(draws: Draws, distribution: FlowTime, name: str = "time") -> Tensor:
    """[B] float32, the share of noise at which a flow is trained, in (0, 1), drawn as `name`.

    `beta`: Beta(1.5, 1) scaled to 0.001 + 0.999 x, more often near the noise, as pi0's (Black et al. 2024, appendix B,
    where 1 - t has this density). Of Esser et al. 2024: `logit_normal`, the sigmoid of a standard normal number, and
    `heavy_tailed`, more often in the middle, with both ends kept: their mode sampling, of scale 1.29.
    """
    if distribution == "logit_normal":
        return torch.sigmoid(draws.normal(name))
    time = draws.uniform(name)
    if distribution == "heavy_tailed":
        return 1.0 - time - _HEAVY_TAILS * (torch.cos(0.5 * math.pi * time).square() - 1.0 + time)
    return time if distribution == "uniform" else 0.999 * time ** (2 / 3) + 0.001


def _write_bits(x: Tensor, low: Tensor, high: Tensor, counter: Tensor, shifted: Tensor) -> None:
    """Fill `x` [B, N] int32 with the random bits of the keys (`low`, `high`) [B] at the places `counter` [N]; `shifted`
    is memory of its size to work in."""
    torch.add(counter, low[:, None], out=x)
    _xor_shift(x, 16, shifted)
    torch.add(high[:, None], x, alpha=0x21F0AAAD, out=x)
    _xor_shift(x, 15, shifted)
    x.mul_(0x735A2D97)
    _xor_shift(x, 15, shifted)


def _xor_shift(x: Tensor, by: int, shifted: Tensor) -> None:
    """x ^= x >> by, in place, for 32 bits; `shifted` is memory to work in."""
    torch.bitwise_right_shift(x, by, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - by)) - 1))  # the shift is arithmetic, the mask makes it logical


def _make_normal(x: Tensor, scratch: Tensor) -> None:
    """Turn `x` [N] float32, whose memory holds random bits, into standard normal numbers; `scratch` [3, N] int32."""
    values, slopes = _normal_table(x.device)
    (tail, share), bits, cell = scratch[1:].view(torch.float32), x.view(torch.int32), scratch[0]
    torch.bitwise_right_shift(bits, 32 - BITS, out=cell).bitwise_and_((1 << BITS) - 1).add_(1)
    tail.copy_(cell).mul_(2.0**-BITS)  # probability of a larger magnitude, in (0, 1]
    place = tail.view(torch.int32)
    torch.bitwise_right_shift(place, _FRACTION, out=cell).sub_(_FIRST_CELL)
    share.copy_(place.bitwise_and_((1 << _FRACTION) - 1))
    # `index_select` takes a quarter of what `values[cell]` does.
    magnitude = torch.index_select(slopes, 0, cell, out=tail).mul_(share)
    magnitude.add_(torch.index_select(values, 0, cell, out=share))
    torch.copysign(magnitude, bits.bitwise_left_shift_(31).view(torch.float32), out=x)


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
    times (1 + point / 256), and the difference to the next one for each of the 2^_FRACTION steps to it."""
    quantile = NormalDist().inv_cdf
    octaves = (2.0 ** (octave - BITS) for octave in range(BITS))
    tails = [base * (1 + point / OCTAVE) for base in octaves for point in range(OCTAVE)]
    values = torch.tensor([*(-quantile(tail / 2) for tail in tails), 0.0], dtype=torch.float64)
    slopes = torch.cat([values.diff(), torch.zeros(1, dtype=torch.float64)]) * 2.0**-_FRACTION
    return values.to(device, torch.float32), slopes.to(device, torch.float32)
