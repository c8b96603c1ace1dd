"""Keyed randomness: every random number is a pure function of what it is for.

Keys are hashed tuples (`key(seed, "noise", dataset, episode)`), never sums of seeds: `42 + 1 == 43 + 0`.
The arithmetic is 64-bit integer mixing (the finaliser of SplitMix64, Steele et al. 2014) and Box-Muller, so a
number depends on no library's generator, rank, worker, batch or version.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STEPS = (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB))
_LAST_SHIFT = np.uint64(31)


def key(*parts: int | str) -> int:
    """A 64-bit key of a tuple of integers and strings; ("a", "bc") differs from ("ab", "c")."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(x: U64) -> U64:
    """The SplitMix64 finaliser: a bijection of 64-bit words that scatters neighbours. uint64 in, uint64 out."""
    with np.errstate(over="ignore"):  # of single numbers: arrays wrap around without a word
        return _mixed(np.asarray(x, np.uint64))


def _mixed(x: U64) -> U64:
    x = x + _GOLDEN
    for shift, factor in _STEPS:
        x ^= x >> shift
        x *= factor
    x ^= x >> _LAST_SHIFT
    return x


def fold(base: int | U64, *columns: NDArray | int) -> U64:
    """Hash of (base, column, column, ...) row by row: integers of any shape that broadcast -> uint64."""
    out = np.asarray(base, np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            out = _mixed(out ^ _mixed(np.asarray(column).astype(np.int64).view(np.uint64)))
    return out


_WORD = 2**64 - 1


def fold_one(base: int, *columns: int) -> int:
    """`fold` of single integers, equal to it and ten times as fast: a sample's key is made for every sample."""
    out = base
    for column in columns:
        out = _mix_one(out ^ _mix_one(column & _WORD))
    return out


def uniform_at(key: int, counter: int) -> float:
    """`uniform(key, counter + 1)[counter]`: one float in [0, 1)."""
    return (fold_one(key, counter) >> 11) * 2.0**-53


def _mix_one(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def uniform(keys: U64 | int, num: int = 1) -> NDArray[np.float64]:
    """`[..., num]` float64 in [0, 1): the top 53 bits of a hash of (key, counter)."""
    keys = np.asarray(keys, np.uint64)[..., None]
    bits = fold(keys, np.arange(num))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(keys: U64 | int, num: int) -> NDArray[np.float32]:
    """`[..., num]` float32 standard normals (Box-Muller over `uniform`), one independent row a key."""
    half = (num + 1) // 2
    u = uniform(keys, 2 * half)
    radius = np.sqrt(-2.0 * np.log1p(-u[..., :half]))
    angle = 2.0 * np.pi * u[..., half:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return both[..., :num].astype(np.float32)
