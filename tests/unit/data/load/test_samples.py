"""`SampleBuilder`: what it holds open, and by what a sample's randomness is keyed."""

from __future__ import annotations

import numpy as np

from opentau_train.data.decode.video import OpenDecoders, reader_bytes
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.types import Address
from tests.unit.data.load.test_real_stream import mixture


def test_open_decoders_are_those_of_the_lanes_cursors_whatever_datasets_they_change_to(tmp_path):
    found = mixture(tmp_path)
    builder = SampleBuilder(found, training=True)
    rng, at = np.random.default_rng(0), {}
    for _ in range(30):
        lane, dataset = int(rng.integers(5)), int(rng.integers(len(found.datasets)))
        episode, frame = found.datasets[dataset].train.window(0)
        builder.build(lane, Address(dataset, episode, frame, 0))
        at[lane] = dataset
        sizes = [size for d in at.values() for size in found.datasets[d].source.frame_sizes.values()]
        held = sum(reader_bytes(size, found.spec.image_size) for size in sizes)
        assert builder.open_decoders == OpenDecoders(len(sizes), held)
    builder.close()
    assert builder.open_decoders == OpenDecoders()


def test_a_samples_key_is_its_episodes_whatever_other_episodes_are_left_out(tmp_path):
    def keys(*overrides):
        found = mixture(tmp_path, *overrides)
        builder = SampleBuilder(found, training=True)
        numbers = found.datasets[0].source.episodes.episode_index.tolist()
        made = {number: builder.build(0, Address(0, place, 1, 0))["key"] for place, number in enumerate(numbers)}
        builder.close()
        return made

    whole, fewer = keys(), keys("data.sources.main.exclude_episodes=[0]")
    assert len(set(whole.values())) == len(whole) > len(fewer) > 1
    assert fewer == {number: key for number, key in whole.items() if number != 0}


def test_lanes_that_a_phase_had_and_the_next_have_not_are_closed(tmp_path):
    """A phase's lanes are some of the tape's slots, in the next phase others: kept, they would add up."""
    found = mixture(tmp_path)
    tape, builder, seen = found.tape(8), SampleBuilder(found, training=True), set()
    for epoch in range(24):
        windows = tape.windows(np.arange(epoch * tape.epoch_size, (epoch + 1) * tape.epoch_size))
        lanes = windows.slot.tolist()
        for lane, dataset in zip(lanes, windows.dataset.tolist(), strict=True):
            builder.cursor(lane, dataset)
        seen |= set(lanes)
        assert set(lanes) <= builder._lanes.keys() and len(builder._lanes) <= len(set(lanes)) + 5
    assert len(seen) > len(set(lanes)) + 5, "else nothing had to be closed"
    builder.close()
    assert builder.open_decoders == OpenDecoders()
