"""Batches: one table of fields, by which samples are stacked, joined, cut, filled up and blanked."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from opentau_train.data.batch import blank_batch, join, stack
from opentau_train.data.fields import FIELDS, Field, Sample, TextField, fields_of
from opentau_train.types import BatchSpec

SPEC = BatchSpec(cameras=("eye", "wrist"), image_size=(12, 16), history=1, state_dim=2, action_dim=3, chunk_length=4)
sizes = st.one_of(st.none(), st.tuples(st.integers(1, 12), st.integers(1, 16)))


def sample(images: dict, number: int) -> Sample:
    return {
        "images": images,
        "state": np.full(2, number, np.float32),
        "state_dim_mask": np.ones(2, bool),
        "prompt": f"go {number}",
        "actions": np.full((4, 3), -number, np.float32),
        "action_is_pad": np.zeros(4, bool),
        "action_dim_mask": np.ones(3, bool),
        "mode": "policy",
        "key": 2**64 - 1 - number,
        "weight": 1.0,
        "group": 2,
        "dataset_index": 1,
        "dataset_repo_id": "d",
        "norm_head": "head",
        "episode_index": number + 3,
        "frame_index": number + 4,
        "pass_index": number + 5,
    }


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4), st.integers(0, 2**32))
def test_pictures_are_centred_on_black_and_missing_ones_masked(shapes, seed):
    rng = np.random.default_rng(seed)
    given = [
        {c: rng.integers(1, 256, (2, *size, 3), np.uint8) for c, size in zip(SPEC.cameras, pair) if size}
        for pair in shapes
    ]
    batch = stack([sample(images, i) for i, images in enumerate(given)], SPEC)
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
    batch = stack([sample({}, i) for i in range(3)], SPEC)
    assert batch.group.tolist() == [2, 2, 2] and batch.dataset_index.tolist() == [1, 1, 1]
    assert batch.episode_index.tolist() == [3, 4, 5] and batch.frame_index.tolist() == [4, 5, 6]
    assert batch.pass_index.tolist() == [5, 6, 7] and batch.key.tolist() == [-1, -2, -3]
    assert batch.state[:, 0].tolist() == [0, 1, 2] and batch.actions[:, 0, 0].tolist() == [0, -1, -2]


def same(one, other) -> None:
    """Two batches hold the same values, field by field."""
    assert [f.name for f in one.fields] == [f.name for f in other.fields]
    for field in one.fields:
        left, right = one.values[field.name], other.values[field.name]
        if isinstance(left, dict):
            assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left), field.name
        else:
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


def samples(num: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    pictures = [{"eye": rng.integers(0, 256, (2, 12, 16, 3), np.uint8)} if i % 3 else {} for i in range(num)]
    return [sample(images, i) for i, images in enumerate(pictures)]


@given(st.permutations(range(7)), st.lists(st.integers(1, 6), unique=True, max_size=3))
def test_parts_joined_in_any_order_are_the_samples_stacked_in_it(order, cuts):
    rows = samples(7)
    bounds = [0, *sorted(cuts), 7]
    parts = [stack(rows[a:b], SPEC) for a, b in itertools.pairwise(bounds)]
    joined = join(parts, order)
    same(joined, stack([rows[i] for i in order], SPEC))
    assert joined.images["eye"].movedim(2, -1).is_contiguous()  # channels stay last in memory


@given(st.integers(1, 8), st.integers(1, 5))
def test_micro_batches_hold_every_sample_once_in_order(num, size):
    batch = stack(samples(num), SPEC)
    parts = list(batch.split(size))
    assert [len(p) for p in parts[:-1]] == [size] * (len(parts) - 1)
    same(join(parts, range(num)), batch)


def test_filling_up_repeats_the_first_sample_with_weight_0():
    batch = stack(samples(3), SPEC).filled_up(5)
    assert batch.weight.tolist() == [1, 1, 1, 0, 0] and batch.prompt == ["go 0", "go 1", "go 2", "go 0", "go 0"]
    same(batch.rows(slice(0, 3)), stack(samples(3), SPEC))
    same(batch.rows(torch.tensor([3])).replace(weight=torch.ones(1)), batch.rows(slice(0, 1)))


def test_a_blank_batch_has_every_field_and_supervises_nothing():
    batch = blank_batch(SPEC)
    assert set(batch.values) == {f.name for f in fields_of(SPEC)}
    assert not batch.weight.any() and batch.action_is_pad.all() and not batch.action_dim_mask.any()
    assert not batch.camera_mask["eye"].any() and not batch.images["eye"].any()


def test_a_new_field_is_one_declaration():
    """It is stacked, joined, cut, filled up, blanked and handed from process to process like all others."""
    spec = dataclasses.replace(SPEC, fields=(Field("depth", ("T", 2), np.float32, -1.0), TextField("subtask")))
    rows = [{**s, "depth": np.full((4, 2), i, np.float32), "subtask": f"part {i}"} for i, s in enumerate(samples(4))]
    batch = stack(rows, spec)
    assert batch.depth.shape == (4, 4, 2) and batch.subtask == ["part 0", "part 1", "part 2", "part 3"]
    same(join(list(batch.split(3)), [3, 2, 1, 0]), stack(rows[::-1], spec))
    assert batch.filled_up(6).depth[5].eq(0).all() and (blank_batch(spec).depth == -1).all()
    same(pickle.loads(pickle.dumps(batch)), batch)
    assert (
        next(iter(DataLoader([batch], batch_size=None, num_workers=1, collate_fn=lambda b: b))).subtask[3] == "part 3"
    )


def test_a_field_that_is_not_there_is_answered_with_the_nearest():
    batch = stack(samples(1), SPEC)
    with pytest.raises(AttributeError, match="no field 'action': did you mean 'actions'"):
        _ = batch.action
    with pytest.raises(AttributeError, match="no field 'weights'"):
        batch.replace(weights=torch.ones(1))


def test_the_mixtures_name_of_a_dataset_is_in_the_batch():
    assert stack(samples(2), SPEC).dataset_repo_id == ["d", "d"]
    assert "dataset_repo_id" in {f.name for f in FIELDS}
