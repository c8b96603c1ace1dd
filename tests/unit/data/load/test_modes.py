"""Samples of several modes: which one each has, what it then holds, and that a policy's sample is what it was."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch

from opentau_train.data.batch import stack
from opentau_train.data.decode.images import fit
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.transforms.base import SampleDraws
from opentau_train.errors import UserError
from opentau_train.types import Address
from tests.unit.data.load.test_real_stream import collect, content, mixture

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

MAIN = "data.sources.main"
FUTURE = ["data.future.num_frames=2", "data.future.stride=3"]
WAM = [*FUTURE, f"{MAIN}.mode=wam"]
JOINT = [*FUTURE, f"{MAIN}.mode=joint", f"{MAIN}.mode_probabilities={{policy:2,wam:1,inverse_dynamics:1}}"]


def build(opened, addresses, *, training=True):
    with closing(SampleBuilder(opened, training=training)) as builder:
        return [builder.build(0, address) for address in addresses]


def all_of(batch):
    """`content`, with the mode and the future."""
    tensors = [*batch.future.values(), *batch.future_mask.values(), batch.future_is_pad]
    return list(zip(content(batch), batch.mode, *([row.numpy().tobytes() for row in t] for t in tensors), strict=True))


def test_any_topology_and_a_resume_draw_the_same_modes_and_futures(tmp_path, monkeypatch):
    opened = mixture(tmp_path, *JOINT)
    monkeypatch.setattr("tests.unit.data.load.test_real_stream.content", all_of)
    whole, _ = collect(opened, tmp_path)
    assert {sample[1] for sample in whole} == {"policy", "wam", "inverse_dynamics"}
    assert collect(opened, tmp_path, size=2, workers=2)[0] == whole
    assert collect(opened, tmp_path, first=3)[0] == whole[12:]


def test_modes_are_drawn_anew_in_each_pass_as_often_as_is_set(tmp_path):
    opened = mixture(tmp_path, *JOINT)
    with closing(SampleBuilder(opened, training=True)) as builder:
        places = [builder.place(0, int(key)) for key in keys(3000)]
    shares = np.bincount(places) / len(places)
    assert np.abs(shares - [0.5, 0.25, 0.25]).max() < 0.03
    drawn = Counter(sample["mode"] for sample in build(opened, [Address(0, 0, 3, p) for p in range(12)]))
    assert len(drawn) > 1


def keys(num):
    return np.random.default_rng(0).integers(0, 2**63, num)


def test_a_policy_s_sample_is_the_same_in_a_joint_run_and_holds_no_future(tmp_path):
    addresses = [Address(0, e, f, p) for e in (0, 1) for f in (0, 5) for p in range(3)]
    joint, alone = mixture(tmp_path, *JOINT), mixture(tmp_path)
    drawn = build(joint, addresses)
    chosen = [i for i, sample in enumerate(drawn) if sample["mode"] == "policy"]
    assert 0 < len(chosen) < len(addresses)
    mine = stack([drawn[i] for i in chosen], joint.spec)
    other = stack(build(alone, [addresses[i] for i in chosen]), alone.spec)
    assert content(mine) == content(other) and mine.mode == other.mode == ["policy"] * len(chosen)
    assert "future" not in other.values
    assert not any(frames.any() for frames in mine.future.values()) and mine.future_is_pad.all()
    assert not any(present.any() for present in mine.future_mask.values())
    groups = [joint.groups[g] for g in mine.group.tolist()]
    assert {(g.dataset, g.mode) for g in groups} == {("main", "policy")}
    assert [g.tag for g in groups] == [f"{alone.groups[g].tag}/policy" for g in other.group.tolist()]


def test_a_group_s_share_is_its_dataset_s_times_how_often_its_mode_is_drawn(tmp_path):
    joint, alone = mixture(tmp_path, *JOINT), mixture(tmp_path)
    of = {g.tag: g.share for g in alone.groups}
    often = {"policy": 0.5, "wam": 0.25, "inverse_dynamics": 0.25}
    assert {g.tag: g.share for g in joint.groups} == {
        **{f"main/default/{mode}": part * of["main/default"] for mode, part in often.items()},
        "old/default/policy": of["old/default"],
    }


def test_a_robot_s_observation_has_no_future(tmp_path):
    opened = mixture(tmp_path, *WAM)
    observation = {"images": {"wrist": np.full((32, 32, 3), 9, np.uint8)}, "state": np.zeros(7, np.float32)}
    batch = opened.pipelines[0].observe([observation], opened.groups[0].norm_head, opened.spec)
    assert batch.mode == ["policy"] and batch.images["wrist"].any() and batch.future_is_pad.all()
    assert not any(present.any() for present in batch.future_mask.values())


def test_a_window_is_validated_in_each_mode_with_that_mode_s_fields_alone(tmp_path):
    opened, places = mixture(tmp_path, *JOINT), range(3)
    with closing(SampleBuilder(opened, training=False)) as builder:
        samples = [builder.build(0, Address(0, 0, 2, 0, place)) for place in places]
        decoded = next(iter(builder.factories.values())).frames_decoded
        builder.build(0, Address(0, 0, 2, 0, 1))
        assert next(iter(builder.factories.values())).frames_decoded == decoded
    batch = stack(samples, opened.spec)
    assert batch.mode == ["policy", "wam", "inverse_dynamics"]
    assert [opened.groups[g].mode for g in batch.group.tolist()] == batch.mode
    assert batch.future_is_pad.all(1).tolist() == [True, False, False]
    for camera, frames in batch.future.items():
        assert batch.future_mask[camera].tolist() == [False, True, True] and not frames[0].any()
        assert torch.equal(frames[1], frames[2]) and frames[1].any()
    assert len(set(batch.key.tolist())) == 1  # the same noise in all


def test_a_policy_s_sample_of_a_joint_source_decodes_no_future(tmp_path):
    opened = mixture(tmp_path, *JOINT)
    decoded = {}
    for pass_index in range(12):
        with closing(SampleBuilder(opened, training=True)) as builder:
            sample = builder.build(0, Address(0, 0, 2, pass_index))
            decoded[sample["mode"]] = next(iter(builder.factories.values())).frames_decoded
    alone = mixture(tmp_path)
    with closing(SampleBuilder(alone, training=True)) as builder:
        builder.build(0, Address(0, 0, 2, 0))
        assert next(iter(builder.factories.values())).frames_decoded == decoded["policy"] < decoded["wam"]


def test_a_batch_has_the_chosen_cameras_frames_and_says_which_are_there(tmp_path):
    opened = mixture(tmp_path, *WAM, "data.future.cameras=[wrist]", "data.history=1")
    last = int(opened.datasets[0].source.episodes.length[0]) - 1
    samples = build(opened, [Address(0, 0, 2, 0), Address(0, 0, last - 4, 0), Address(1, 0, 2, 0)])
    batch = stack(samples, opened.spec)
    assert opened.spec.future == 2 and opened.spec.future_cameras == ("wrist",) and list(batch.future) == ["wrist"]
    assert batch.future["wrist"].shape == (3, 2, 3, 32, 32) and batch.future["wrist"].dtype == torch.uint8
    assert {frames.shape for frames in batch.images.values()} == {(3, 2, 3, 32, 32)}
    assert batch.future_mask["wrist"].tolist() == [True, True, False]
    assert batch.future_is_pad.tolist() == [[False, False], [False, True], [True, True]]
    assert batch.mode == ["wam", "wam", "policy"]
    plain = mixture(tmp_path)
    later = stack(build(plain, [Address(0, 0, 5, 0), Address(0, 0, 8, 0), Address(0, 0, last, 0)]), plain.spec)
    assert torch.equal(batch.future["wrist"][0, 0], later.images["wrist"][0, 0])
    assert torch.equal(batch.future["wrist"][0, 1], later.images["wrist"][1, 0])
    assert torch.equal(batch.future["wrist"][1, 1], later.images["wrist"][2, 0])  # the episode's last, repeated
    blank = stack([{}], opened.spec)
    assert blank.future_is_pad.all() and not blank.future_mask["wrist"].any()


def test_future_frames_are_augmented_as_the_camera_s_other_frames_are(tmp_path):
    opened = mixture(tmp_path, *WAM, "data/augment=openpi", "data.history=1")
    (sample,) = build(opened, [Address(0, 0, 2, 0)])
    augment, window = opened.pipelines[0].transforms["augment"], opened.datasets[0].window(opened.spec)
    with closing(opened.datasets[0].source.cursors(window)) as factory:
        raw = factory.cursor().read(0, 2, future=True)
    for camera, frames in raw.images.items():
        wanted = augment.apply(frames, augment.draw(camera, SampleDraws(sample["key"], "augment")))
        assert np.array_equal(sample["images"][camera], wanted[:2])
        assert np.array_equal(sample["future"][camera], wanted[2:]) and len(wanted) == 4


def test_mirrored_samples_have_mirrored_futures_and_dropped_cameras_none(tmp_path):
    mirror = "+data.sources.main.transforms.mirror={_target_:opentau_train.data.transforms.augment.Mirror,"
    mirror += 'probability:1.0,keep:["*"],swap:{front:wrist}}'
    addresses = [Address(0, 0, f, 0) for f in range(8)]
    plain, mirrored = (build(mixture(tmp_path, *WAM, *words), addresses) for words in ([], [mirror]))
    for sample, other in zip(plain, mirrored, strict=True):
        for camera, twin in (("front", "wrist"), ("wrist", "front")):
            assert np.array_equal(sample["future"][camera][:, :, ::-1], other["future"][twin])
    dropped = build(mixture(tmp_path, *WAM, "data.dropout.camera=0.5"), addresses)
    assert all(sample["future"].keys() == sample["images"].keys() for sample in dropped)
    assert len({tuple(sample["images"]) for sample in dropped}) > 2
    black = build(mixture(tmp_path, *WAM, "data.blank_images=true"), addresses[:1])
    assert not any(frames.any() for frames in black[0]["future"].values())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.future.cameras=[writs]"], "no source has the camera 'writs': did you mean 'wrist'"),
        (["data.future.cameras=[wrist]", "data.sources.old.mode=wam"], "dataset 'old' has a mode with future frames"),
        ([f"{MAIN}.cameras=[]", "data.sources.old.mode=policy"], "dataset 'main' has a mode with future frames"),
    ],
)
def test_a_mode_without_its_cameras_is_refused_and_the_remedy_works(words, expected, tmp_path):
    with pytest.raises(UserError, match=expected) as caught:
        mixture(tmp_path, *WAM, *words)
    remedy = caught.value.remedy.rpartition("set ")[2]
    mixture(tmp_path, *WAM, *words, remedy)


def test_lanes_hold_the_rows_that_a_future_reaches_over(tmp_path):
    held = []
    for opened in (mixture(tmp_path), mixture(tmp_path, *WAM, "data.future.cameras=[wrist]")):
        held.append(opened.datasets[0].decoders(opened.datasets[0].window(opened.spec)))
    height, width = fit(*opened.datasets[0].source.frame_sizes["wrist"], (32, 32))
    assert held[0].num == held[1].num and held[1].num_bytes - held[0].num_bytes == 2 * 3 * height * width * 3
