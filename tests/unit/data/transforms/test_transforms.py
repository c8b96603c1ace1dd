"""Transforms: what each does, undone by its inverse; keyed draws; the same list for training and for a robot."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.data.fields import Field
from opentau_train.data.transforms.base import SampleDraws, Transform, Wants
from opentau_train.data.transforms.drop import BlankImages, DropInputs
from opentau_train.data.transforms.normalize import Affine, Normalize
from opentau_train.data.transforms.pipeline import Pipeline, compose, meet, with_fields
from opentau_train.data.transforms.shape import ChoosePrompt, Pad
from opentau_train.data.transforms.units import Scale
from opentau_train.errors import UserError
from opentau_train.types import BatchSpec

HEAD = "arm::joint"
NAMES = ("state[0]", "state[1]", "state.gripper"), ("joint[0]", "joint[1]", "gripper")
SPEC = BatchSpec(("eye",), (8, 8), 1, 5, 4, 6, (HEAD,), ("policy",))


def pipeline(**changes) -> Pipeline:
    """All shared transforms, after one that halves the state's and thousandths the joints' units."""
    heads = {HEAD: {"state": ((1.0, 2.0, 0.0), (0.5, 0.25, 0.0)), "actions": ((0.1, 0.2, 0.3), (2.0, 4.0, 8.0))}}
    scale = Scale(state={"*[*]": 0.5}, actions={"joint*": 0.001}).for_names(*NAMES)
    made = {
        "scale": scale,
        "choose_prompt": ChoosePrompt(),
        "normalize": Normalize(heads),
        "pad": Pad(5, 4, 6, {HEAD: (3, 3)}),
        "drop_inputs": DropInputs(),
    }
    return Pipeline({**made, **changes})


def record(seed: int = 0, steps: int = 4) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "images": {"eye": rng.integers(0, 256, (2, 8, 8, 3), np.uint8)},
        "state": rng.normal(size=3).astype(np.float32),
        "actions": rng.normal(size=(steps, 3)).astype(np.float32),
        "action_is_pad": np.arange(steps) > 2,
        "prompts": ("open", "close", "push"),
        "norm_head": HEAD,
    }


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_a_chunk_goes_back_to_the_units_that_it_came_from(seed, steps):
    given = record(seed, steps)
    sample = pipeline()(given, 7, training=True)
    assert sample["actions"].shape == (6, 4) and sample["state"].shape == (5,)
    units = pipeline().units(sample["actions"], HEAD, state=sample["state"])
    assert units.shape == (6, 3)
    np.testing.assert_allclose(units[:steps], given["actions"], rtol=1e-4, atol=1e-3)


def test_each_step_of_a_chunk_has_its_own_statistics_and_the_last_ones_serve_longer_chunks():
    affine = Affine(np.array([[0.0], [1.0], [2.0]], np.float32), np.array([[1.0], [2.0], [4.0]], np.float32))
    chunk = np.full((5, 1), 3.0, np.float32)
    normalised = affine.normalize(chunk)
    assert normalised[:, 0].tolist() == [3.0, 4.0, 4.0, 4.0, 4.0]
    assert affine.normalize(chunk[:2])[:, 0].tolist() == [3.0, 4.0]
    np.testing.assert_array_equal(affine.denormalize(normalised), chunk)
    assert affine.denormalize(np.ones((5, 1), np.float32))[:, 0].tolist() == [1.0, 1.5, 2.25, 2.25, 2.25]


def test_padding_is_masked_and_zero():
    sample = pipeline()(record(), 7, training=False)
    assert sample["action_is_pad"].tolist() == [False, False, False, True, True, True]
    assert sample["action_dim_mask"].tolist() == [True, True, True, False]
    assert sample["state_dim_mask"].tolist() == [True, True, True, False, False]
    assert not sample["actions"][4:].any() and not sample["actions"][:, 3].any() and not sample["state"][3:].any()


def test_no_transform_writes_into_what_it_is_given():
    given = record()
    for value in (given["state"], given["actions"], given["action_is_pad"], given["images"]["eye"]):
        value.flags.writeable = False
    dropping = DropInputs(prompt=0.5, state=0.5, camera=0.5)
    for key in range(20):
        pipeline(drop_inputs=dropping, blank_images=BlankImages())(given, key, training=True)


def test_draws_depend_on_the_sample_and_the_transforms_name_alone():
    """One more transform, or one less, changes no other's numbers; another name does; validation drops nothing."""
    dropping = DropInputs(prompt=0.5, state=0.5, camera=0.5)
    without = Pipeline({"drop_inputs": dropping})
    given = record() | {"prompt": "open", "state_dim_mask": np.ones(3, bool)}
    kept = [bool(without(given, key, training=True)["prompt"]) for key in range(200)]
    assert kept == [bool(pipeline(drop_inputs=dropping)(given, key, training=True)["prompt"]) for key in range(200)]
    assert kept != [bool(Pipeline({"other": dropping})(given, key, training=True)["prompt"]) for key in range(200)]
    assert 60 < sum(kept) < 140
    assert all(without(given, key, training=False)["prompt"] for key in range(200))


def test_each_dropped_input_is_drawn_by_itself_and_dropped_whole():
    dropping = Pipeline({"drop_inputs": DropInputs(prompt=0.3, state=0.3, camera=0.3)})
    given = record() | {"prompt": "open", "state_dim_mask": np.ones(3, bool)}
    rows = []
    for key in range(3000):
        sample = dropping(given, key, training=True)
        assert bool(sample["state"].any()) == bool(sample["state_dim_mask"].any())
        rows.append([not sample["prompt"], not sample["state"].any(), "eye" not in sample["images"]])
    share = np.corrcoef(np.array(rows, float).T)
    assert np.abs(np.mean(rows, axis=0) - 0.3).max() < 0.03
    assert np.abs(share - np.eye(3)).max() < 0.08


def test_prompts_are_chosen_evenly_and_anew_in_each_pass():
    chosen = [ChoosePrompt()(record(), SampleDraws(key, "choose_prompt"))["prompt"] for key in range(900)]
    assert all(240 < chosen.count(text) < 360 for text in ("open", "close", "push"))
    assert ChoosePrompt()({"prompts": ()}, SampleDraws(0, "c"))["prompt"] == ""


def test_transforms_are_saved_as_data_and_built_again():
    made = pipeline(drop_inputs=DropInputs(prompt=0.2))
    again = Pipeline.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    for key in range(5):
        one, other = made(record(key), key, training=True), again(record(key), key, training=True)
        assert one["prompt"] == other["prompt"]
        for name in ("state", "actions", "action_is_pad"):
            np.testing.assert_array_equal(one[name], other[name])


def test_an_observation_becomes_the_sample_that_the_dataset_gives():
    given = record()
    sample = pipeline()(given, 0, training=False)
    observation = {"images": given["images"], "state": given["state"], "prompt": sample["prompt"]}
    batch = pipeline().observe([observation, {"state": given["state"]}], HEAD, SPEC)
    assert torch.equal(batch.state[0], torch.from_numpy(sample["state"]))
    assert torch.equal(batch.images["eye"][0], torch.from_numpy(given["images"]["eye"]).movedim(-1, 1))
    assert batch.prompt == [sample["prompt"], ""] and batch.camera_mask["eye"].tolist() == [True, False]
    assert batch.weight.tolist() == [1, 1] and batch.norm_head == [HEAD, HEAD]
    single = pipeline().observe([{**observation, "images": {"eye": given["images"]["eye"][1]}}], HEAD, SPEC)
    assert torch.equal(single.images["eye"][0, 0], batch.images["eye"][0, 1])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"eyes": np.zeros((8, 8, 3), np.uint8)}, "did you mean 'eye'"),
        ({"eye": np.zeros((9, 8, 3), np.uint8)}, "H and W at most"),
        ({"eye": np.zeros((8, 8, 3), np.float32)}, "float32"),
        ({"eye": np.zeros((3, 8, 8, 3), np.uint8)}, r"give \[2, H, W, 3\]"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused(images, words):
    with pytest.raises(UserError, match=words):
        pipeline().observe([{"images": images, "state": np.zeros(3)}], HEAD, SPEC)


def test_statistics_are_of_transformed_rows():
    rows = np.ones((5, 3), np.float32), np.ones((5, 3), np.float32)
    state, actions = Pipeline({"scale": pipeline().transforms["scale"], "choose": ChoosePrompt()}).rows(*rows)
    assert state[0].tolist() == [0.5, 0.5, 1.0] and actions[0].tolist() == pytest.approx([0.001, 0.001, 1.0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actions": {"jiont[0]": 2.0}}, "no dimension of actions is named 'jiont\\[0\\]'.*did you mean"),
        ({"state": {"*": 0.0}}, "a factor of state is 0"),
        ({"sate": {"*": 1.0}}, "did you mean 'state'"),
    ],
)
def test_mistakes_in_a_transforms_options_are_answered(options, words):
    tree = {"scale": {"_target_": "opentau_train.data.transforms.units.Scale", **options}}
    with pytest.raises(UserError, match=words):
        compose([tree], *NAMES, "data.sources.a.transforms")


def test_two_transforms_of_one_name_are_refused():
    tree = {"scale": {"_target_": "opentau_train.data.transforms.units.Scale"}}
    with pytest.raises(UserError, match="two transforms are named 'scale'"):
        compose([tree, tree], *NAMES, "data.transforms")


def test_what_a_policy_needs_and_the_mixture_lacks_is_an_error_at_start():
    with pytest.raises(UserError, match=r"takes pictures of 224x224.*\n.*\n.*data.image_size=\[224,224\]"):
        meet(SPEC, Wants(image_size=(224, 224)))
    assert meet(SPEC, Wants(image_size=(8, 8))) == SPEC


def test_a_field_declared_twice_must_be_the_same_one():
    @dataclass(frozen=True)
    class Adds(Transform):
        size: int

        def fields(self, spec):
            return (Field("depth", (self.size,)),)

    assert [f.name for f in with_fields(SPEC, [Adds(2), Adds(2)]).fields] == ["depth"]
    with pytest.raises(UserError, match="declare the field 'depth' differently"):
        with_fields(SPEC, [Adds(2), Adds(3)])
