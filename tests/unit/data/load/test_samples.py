"""`SampleBuilder`'s account of what it holds open."""

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
