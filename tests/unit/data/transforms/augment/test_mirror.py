"""The mirror image of a sample, as its source declares it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.config.typed import instantiate
from opentau_train.data.transforms.augment.mirror import Mirror
from opentau_train.data.transforms.base import SampleDraws
from opentau_train.data.transforms.pipeline import Pipeline, compose
from opentau_train.errors import UserError
from tests.unit.data.load.test_real_stream import mixture
from tests.unit.data.transforms.augment.test_pixels import noise

TARGET = "opentau_train.data.transforms.augment.Mirror"
STATE = ("left.shoulder", "left.grip", "right.shoulder", "right.grip", "torso.yaw")
ACTIONS = ("left.x", "left.y", "right.x", "right.y")
DECLARED = {"probability": 1.0, "negate": ["*.shoulder", "*.yaw", "*.y"]}


def mirror(**options) -> Mirror:
    return instantiate({"_target_": TARGET, **DECLARED, **options}, "mirror").for_names(STATE, ACTIONS)


def record(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "images": {name: np.stack([noise(seed + k)] * 2) for k, name in enumerate(("left_eye", "right_eye", "top"))},
        "state": rng.normal(size=5).astype(np.float32),
        "actions": rng.normal(size=(6, 4)).astype(np.float32),
        "prompts": ("Left hand: hold the cup on the right", "leftover"),
    }


def test_left_is_right_in_pictures_actions_state_and_words():
    given, seen = record(), mirror()(record(), SampleDraws(1, "mirror"))
    a, b, c, d, yaw = given["state"]
    assert seen["state"].tolist() == [-c, d, -a, b, -yaw] and seen["state"].dtype == np.float32
    assert np.array_equal(seen["actions"], given["actions"][:, [2, 3, 0, 1]] * [1, -1, 1, -1])
    assert seen["prompts"] == ("Right hand: hold the cup on the left", "leftover")
    for camera, other in (("left_eye", "right_eye"), ("right_eye", "left_eye"), ("top", "top")):
        assert np.array_equal(seen["images"][camera], given["images"][other][:, :, ::-1])
        assert seen["images"][camera].flags.c_contiguous


@given(st.integers(0, 1000))
def test_mirrored_twice_is_the_same(seed):
    given, twice = record(seed), mirror()(mirror()(record(seed), SampleDraws(1, "mirror")), SampleDraws(1, "mirror"))
    assert {c: v.tobytes() for c, v in twice["images"].items()} == {c: v.tobytes() for c, v in given["images"].items()}
    for name in ("state", "actions"):
        assert np.array_equal(twice[name], given[name])
    assert twice["prompts"] == given["prompts"]


def test_a_sample_is_mirrored_whole_with_the_probability_and_never_outside_training():
    pipeline = Pipeline({"mirror": mirror(probability=0.3)})
    states = [pipeline(record(), key, training=True)["state"][0] for key in range(600)]
    assert set(states) == {record()["state"][0], -record()["state"][2]}
    assert 120 < sum(s == -record()["state"][2] for s in states) < 240
    assert all(pipeline(record(), key, training=False)["state"][0] == record()["state"][0] for key in range(50))
    rows = record()["state"][None], record()["actions"][0, None]
    assert all(np.array_equal(a, b) for a, b in zip(Pipeline({"mirror": mirror()}).rows(*rows), rows, strict=True))
    assert pipeline.units(record()["actions"], "arm").tobytes() == record()["actions"].tobytes()


def test_what_is_not_declared_is_refused_and_the_remedy_helps():
    tree = {"_target_": TARGET, "probability": 0.5, "swap": {}, "negate": ["*.y"], "keep": ["torso*", "*.yaw"]}
    with pytest.raises(UserError) as caught:
        compose([{"mirror": tree}], STATE, ACTIONS, "data.sources.main.transforms")
    assert caught.value.what.startswith("what mirroring does to left.shoulder, left.grip, right.shoulder, right.grip ")
    helped = {**tree, "keep": ["*.grip", "*.x", "torso*"], "negate": ["*.y", "*.shoulder"]}
    assert compose([{"mirror": helped}], STATE, ACTIONS, "")[0]["mirror"].keep == ("*.grip", "*.x", "torso*")
    with pytest.raises(UserError, match=r"torso\.yaw is not declared, or twice"):
        compose([{"mirror": {**helped, "negate": [*helped["negate"], "*.yaw"]}}], STATE, ACTIONS, "")
    with pytest.raises(UserError, match="probability must be a number from 0 to 1"):
        mirror(probability=1.5)


def test_pictures_of_a_run_are_mirrored_where_the_source_declares_it_alone(tmp_path):
    at = "data.sources.main.transforms.mirror"
    words = [f"{at}._target_={TARGET}", f"{at}.probability=1.0", f"{at}.keep=['*']"]
    plain, mirrored = mixture(tmp_path), mixture(tmp_path, *words)
    assert [list(d.transforms) for d in mirrored.datasets] == [["mirror"], []]
    assert str(plain.stats) == str(mirrored.stats)
    frames = {camera: noise()[None] for camera in plain.datasets[0].source.cameras}
    state = np.zeros(len(plain.datasets[0].state_names), np.float32)
    seen = {"images": frames, "state": state, "prompts": ("go",), "norm_head": plain.pipelines[0] and _head(plain)}
    for training in (True, False):
        images = mirrored.pipelines[0](dict(seen), 1, training=training)["images"]
        assert all(np.array_equal(v, frames[c][:, :, :: -1 if training else 1]) for c, v in images.items())


def _head(opened) -> str:
    return opened.groups[int(opened.datasets[0].group_of[0])].norm_head
