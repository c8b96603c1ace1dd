"""Draws: functions of the sample and the use alone, distributed as their names say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opentau_train import rng
from opentau_train.models.draws import Draws, mix

KEYS = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 64))


def reference_bits(key: int, index: int, name: str, counter: int) -> int:
    """The generator as its docstring states it, in Python's integers."""
    word = 2**32 - 1
    state = rng.fold_one(0)  # no columns: the base itself
    state = int(rng.mix(np.uint64((key % 2**64) ^ rng.key("draws", index, name) ^ state)))
    low, high = state & word, state >> 32
    x = (counter + low) & word
    x = (x ^ x >> 16) * 0x21F0AAAD + high & word
    x = (x ^ x >> 15) * 0x735A2D97 & word
    return x ^ x >> 15


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**21), st.text(max_size=5), st.integers(1, 200))
def test_bits_are_the_stated_hash_of_key_index_name_and_place(key, index, name, size):
    bits = Draws(torch.tensor([key]), index).bits(name, (size,))
    assert bits.shape == (1, size) and bits.dtype == torch.int32
    for counter in {0, size // 2, size - 1}:
        assert int(bits[0, counter]) % 2**32 == reference_bits(key, index, name, counter)


def test_mixing_equals_that_of_the_keys():
    assert (mix(KEYS).numpy().view(np.uint64) == rng.mix(KEYS.numpy().view(np.uint64))).all()


@given(st.permutations(range(8)), st.integers(1, 8))
def test_a_samples_numbers_do_not_depend_on_the_batch_that_it_is_in(order, size):
    """Bit for bit, at any place, in a batch of any size: nothing in them is computed by a vectorised function whose
    last bit depends on the place."""
    whole = Draws(KEYS[:8], 3)
    part = Draws(KEYS[torch.tensor(order[:size])], 3)
    for draw in (
        lambda d: d.normal("a", (3, 5)),
        lambda d: d.uniform("a"),
        lambda d: d.choice("a", 7, (2,)),
    ):
        assert torch.equal(draw(part), draw(whole)[torch.tensor(order[:size])])


def test_names_indices_and_keys_tell_draws_apart():
    draws = [Draws(KEYS).normal("a", (50,)), Draws(KEYS).normal("b", (50,)), Draws(KEYS, 1).normal("a", (50,))]
    for i, one in enumerate(draws):
        assert torch.equal(one, (Draws(KEYS).normal("a", (50,)), Draws(KEYS).normal("b", (50,)), draws[2])[i])
        for other in draws[:i]:
            assert abs(float((one * other).mean())) * math.sqrt(one.numel()) < 4
    assert draws[0].unique(dim=0).shape[0] == len(KEYS)


def test_normal_numbers_are_normal():
    """Against the normal distribution's moments and, by Kolmogorov and Smirnov's test, its distribution function."""
    z = Draws(torch.arange(400)).normal("noise", (50, 50)).double().flatten()
    n = len(z)
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 4 * math.sqrt(deviation / n)
    cdf = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    place = torch.arange(n) / n
    assert float((cdf - place).abs().max()) * math.sqrt(n) < 1.95  # exceeded once in a thousand
    assert z.abs().max() > 4.5 and z.abs().max() < 5.5


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1)])
def test_neighbours_are_independent(shift):
    """Neighbouring places of a sample and neighbouring keys: their values, and their sizes."""
    z = Draws(torch.arange(300)).normal("noise", (2000,)).double()
    rows, columns = shift
    one, other = z[rows:, columns:], z[: len(z) - rows, : z.shape[1] - columns]
    for function in (lambda x: x, lambda x: (x**2 - 1) / math.sqrt(2)):
        assert abs(float((function(one) * function(other)).mean())) * math.sqrt(one.numel()) < 4


def test_uniform_numbers_and_choices_are_even():
    draws = Draws(torch.arange(2000))
    u, c = draws.uniform("time", (50,)), draws.choice("mode", 10, (50,))
    assert u.dtype == torch.float32 and float(u.min()) >= 0 and float(u.max()) < 1
    for counts in (torch.histc(u, 50, 0, 1), torch.bincount(c.flatten(), minlength=10)):
        expected = u.numel() / len(counts)
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < len(counts) + 4 * math.sqrt(2 * len(counts))


def test_pinned_numbers():
    """A change of these changes every run's noise: it needs a reason, and an entry in the changelog."""
    draws = Draws(torch.tensor([0, 1, -1]))
    assert draws.bits("actions", (2,)).tolist() == PINNED_BITS
    assert draws.normal("actions", (2,)).view(torch.int32).tolist() == PINNED_NORMAL


PINNED_BITS = [[-172747929, -1968833879], [-1965114070, -1632222439], [814515335, 763167668]]
PINNED_NORMAL = [[-1118924632, -1088666783], [1058794932, -1090656773], [-1079516266, 1068271659]]
