"""Batches of samples whose pictures differ in size, or are missing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.data.load.collate import collate
from opentau_train.types import BatchSpec, Provenance, Sample

SPEC = BatchSpec(cameras=("eye", "wrist"), image_size=(12, 16), history=1, state_dim=2, action_dim=3, chunk_length=4)
sizes = st.one_of(st.none(), st.tuples(st.integers(1, 12), st.integers(1, 16)))


def sample(images: dict, number: int) -> Sample:
    provenance = Provenance(1, "d", 2, "head", number + 3, number + 4, number + 5)
    state, actions = np.full(2, number, np.float32), np.full((4, 3), -number, np.float32)
    masks = np.ones(2, bool), np.zeros(4, bool), np.ones(3, bool)
    return Sample(images, state, actions, *masks, "go", "policy", 2**64 - 1 - number, provenance)


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4), st.integers(0, 2**32))
def test_pictures_are_centred_on_black_and_missing_ones_masked(shapes, seed):
    rng = np.random.default_rng(seed)
    given = [
        {c: rng.integers(1, 256, (2, *size, 3), np.uint8) for c, size in zip(SPEC.cameras, pair) if size}
        for pair in shapes
    ]
    batch = collate([sample(images, i) for i, images in enumerate(given)], SPEC)
    for camera in SPEC.cameras:
        assert batch.images[camera].shape == (len(given), 2, 3, 12, 16)
        assert batch.camera_mask[camera].tolist() == [camera in images for images in given]
        for i, images in enumerate(given):
            shown = batch.images[camera][i].permute(0, 2, 3, 1).numpy()
            if camera not in images:
                assert not shown.any()
                continue
            height, width = images[camera].shape[1:3]
            top, left = (12 - height) // 2, (16 - width) // 2
            inside = shown[:, top : top + height, left : left + width]
            np.testing.assert_array_equal(inside, images[camera])
            assert np.count_nonzero(shown) == images[camera].size  # no drawn pixel is 0: all around is black


def test_provenance_and_numbers_keep_their_rows():
    batch = collate([sample({}, i) for i in range(3)], SPEC)
    assert batch.group.tolist() == [2, 2, 2] and batch.dataset_index.tolist() == [1, 1, 1]
    assert batch.episode_index.tolist() == [3, 4, 5] and batch.frame_index.tolist() == [4, 5, 6]
    assert batch.pass_index.tolist() == [5, 6, 7] and batch.key.tolist() == [-1, -2, -3]
    assert batch.state[:, 0].tolist() == [0, 1, 2] and batch.actions[:, 0, 0].tolist() == [0, -1, -2]
