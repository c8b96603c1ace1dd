"""From every declared convention to every wanted one, and back to the dataset's own actions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.config import typed
from opentau_train.data.convention import ANGLES, WIDTHS, Convention, Part, named
from opentau_train.data.conventions.steps import Conversions, conversions
from opentau_train.data.transforms.normalize import Normalize
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.data.transforms.shape import Pad
from opentau_train.errors import UserError
from tests.rotation_formulas import angle_between, matrices, some

HEAD = "arm::joint"
FORMATS = tuple(WIDTHS)
seeds = st.integers(0, 2**31)


def convention(**parts: list[dict]) -> Convention:
    return typed.build(Convention, parts, "convention")


def width(part: Part) -> int:
    return WIDTHS[part.rotation] if part.rotation else part.width


def form(part: Part) -> str:
    return part.rotation + (":deg" if part.unit == "deg" else "")


def converted(declared: Convention, wanted: Convention) -> Conversions:
    names = ([f"{v}.{i}" for i in range(sum(map(width, getattr(declared, v) or ())))] for v in ("state", "actions"))
    return conversions(declared, wanted, *map(tuple, names), "main")


def values(rng: np.random.Generator, part: Part, shape: tuple[int, ...]) -> np.ndarray:
    """[*shape, n] f32 that the part may have; deltas are smaller."""
    step = part.reference == "delta_step"
    if part.kind == "rotation":
        return some(rng, shape, form(part), 0.3 if step else 3.0)
    low, high = part.range or (-1.0, 1.0)
    size = {"deg": 90.0, "mm": 300.0}.get(part.unit, 1.0) if part.range is None else 1.0
    made = rng.uniform(low, high, (*shape, width(part))) * size
    return (made * (0.1 if step else 1.0)).astype(np.float32)


def vector(rng: np.random.Generator, parts: tuple[Part, ...], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([values(rng, part, shape) for part in parts], axis=-1)


def assert_same(found: np.ndarray, true: np.ndarray, parts: tuple[Part, ...]) -> None:
    """Equal to 1e-5, numbers relative to their part's size, rotations as rotations."""
    end = 0
    for part in parts:
        here = slice(end, end := end + width(part))
        if part.kind == "rotation":
            assert (
                angle_between(matrices(found[..., here], form(part)), matrices(true[..., here], form(part))).max()
                < 1e-5
            )
        else:
            size = max(1.0, np.abs(true[..., here]).max())
            np.testing.assert_allclose(found[..., here], true[..., here], atol=1e-5 * size)
    assert end == found.shape[-1] == true.shape[-1]


def oracle(made: Conversions, state: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, Pipeline]:
    """(what a policy that knows the truth gives back in the robot's units, the pipeline)."""
    dims = len(made.state_names), len(made.action_names)
    heads = {
        "state": ((0.1,) * dims[0], (0.5,) * dims[0]),
        "actions": (((0.2,) * dims[1], (0.0,) * dims[1]), ((2.0,) * dims[1], (1.5,) * dims[1])),  # by step
    }
    shared = {"normalize": Normalize({HEAD: heads}), "pad": Pad(dims[0] + 2, dims[1] + 3, 16, {HEAD: dims})}
    tree = json.loads(json.dumps(Pipeline({**made.transforms, **shared}).to_json()))
    pipeline = Pipeline.from_json(tree)
    record = {"state": state, "actions": actions, "action_is_pad": np.zeros(len(actions), bool), "norm_head": HEAD}
    before = state.copy(), actions.copy()
    sample = pipeline(record, 0, training=True)
    np.testing.assert_array_equal(before[0], state)
    np.testing.assert_array_equal(before[1], actions)
    seen = pipeline({"state": state, "norm_head": HEAD}, 0, training=False)["state"]
    np.testing.assert_array_equal(seen, sample["state"])
    return pipeline.units(sample["actions"], HEAD, state=sample["state"])[: len(actions)], pipeline


@st.composite
def conventions(draw) -> tuple[Convention, Convention]:
    """(declared, wanted): the same parts, in whatever units, formats and references."""
    kinds = draw(st.lists(st.sampled_from(["joint", "pose", "gripper", "other"]), min_size=1, max_size=4))
    kinds = [kind for k in kinds for kind in (("position", "rotation") if k == "pose" else (k,))]
    tables: dict[str, list[dict]] = {name: [] for name in ("actions", "state", "to_actions", "to_state")}
    for kind in kinds:
        deltas = st.sampled_from(["absolute", "delta_step"]), st.sampled_from(["absolute", "delta_start", "delta_step"])
        one = {"actions": {"reference": draw(deltas[0])}, "to_actions": {"reference": draw(deltas[1])}}
        one |= {"state": {}, "to_state": {}}
        units = {"joint": ["rad", "deg"], "position": ["m", "mm"]}.get(kind)
        if units:
            wanted = draw(st.sampled_from(units))
            for table, of in one.items():
                of["unit"] = wanted if table.startswith("to") else draw(st.sampled_from(units))
        dims = draw(st.integers(1, 3)) if kind in ("joint", "other") else None
        grip = {
            "polarity": draw(st.sampled_from(["open", "closed"])),
            "range": draw(st.sampled_from([(0, 1), (-1, 1)])),
        }
        for table, of in one.items():
            of |= {"kind": kind}
            if dims and not table.startswith("to"):
                of["dims"] = dims
            if kind == "rotation":
                of["rotation"] = draw(st.sampled_from(FORMATS))
                if of["rotation"] in ANGLES:
                    of["unit"] = draw(st.sampled_from(["rad", "deg"]))
            if kind == "gripper":
                of |= (
                    grip
                    if table.startswith("to")
                    else {
                        "polarity": draw(st.sampled_from(["open", "closed"])),
                        "range": draw(st.sampled_from([(0, 1), (-1, 1), (0, 0.08)])),
                    }
                )
            if kind in ("position", "rotation") and of.get("reference", "absolute") != "absolute":
                of["frame"] = draw(st.sampled_from(["base", "tool"]))
            tables[table].append(of)
    for table in ("to_actions", "to_state"):  # by name, in another order
        parts = [
            {**p, "name": n.name}
            for p, n in zip(
                tables[table], named(typed.build(Convention, {"state": tables["state"]}, "").state), strict=True
            )
        ]
        tables[table] = draw(st.permutations(parts))
    declared = convention(actions=tables["actions"], state=tables["state"])
    return declared, convention(actions=tables["to_actions"], state=tables["to_state"])


@given(both=conventions(), seed=seeds)
def test_an_oracle_gives_back_the_datasets_own_actions(both, seed):
    declared, wanted = both
    rng = np.random.default_rng(seed)
    state, actions = vector(rng, declared.state, ()), vector(rng, declared.actions, (9,))
    made = converted(declared, wanted)
    found, _ = oracle(made, state, actions)
    assert_same(found, actions, declared.actions)
    parts = made.convention.actions
    assert [p.name for p in parts] == [p.name for p in wanted.actions] and len(made.action_names) == sum(
        map(width, parts)
    )
    for part, want in zip(parts, wanted.actions, strict=True):
        assert part.reference == want.reference and part.rotation == want.rotation and part.range == want.range


@given(both=conventions(), seed=seeds)
def test_windows_of_an_episode_are_converted_at_once_as_each_by_itself(both, seed):
    declared, wanted = both
    rng = np.random.default_rng(seed)
    state, actions = vector(rng, declared.state, (4,)), vector(rng, declared.actions, (4, 6))
    pipeline = Pipeline(converted(declared, wanted).transforms)
    states, chunks = pipeline.rows(state, actions)
    for i in range(4):
        one = pipeline({"state": state[i], "actions": actions[i]}, 0, training=True)
        np.testing.assert_allclose(states[i], one["state"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(chunks[i], one["actions"], rtol=1e-5, atol=1e-5)


JOINTS = {"kind": "joint", "dims": 7, "unit": "rad", "reference": "absolute"}
GRIPPER = {"kind": "gripper", "polarity": "closed", "range": [0, 1], "reference": "absolute"}
ARM = {"actions": [JOINTS, GRIPPER], "state": [{**JOINTS}, {**GRIPPER}]}


def test_joint_deltas_are_openpis_with_an_absolute_gripper():
    rng = np.random.default_rng(0)
    state, actions = rng.normal(size=8).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)
    wanted = convention(actions=[{"kind": "joint", "reference": "delta_start"}, {"kind": "gripper"}])
    made = converted(convention(**ARM), wanted)
    assert list(made.transforms) == ["convert_deltas"] and made.convention.space == "joint"
    mask = np.array([True] * 7 + [False])
    expected = actions - np.where(mask, state, 0)
    np.testing.assert_array_equal(Pipeline(made.transforms).rows(state, actions)[1], expected)
    np.testing.assert_array_equal(oracle(made, state, actions)[0].shape, actions.shape)


def test_a_gripper_is_turned_round_and_stretched():
    state = {"kind": "gripper", "polarity": "open", "range": [0, 0.08], "unit": "m"}
    declared = convention(actions=[GRIPPER], state=[state])
    to = {"kind": "gripper", "polarity": "open", "range": [-1, 1]}
    made = converted(declared, convention(actions=[to], state=[{**to, "polarity": "closed", "range": [0, 1]}]))
    rows = Pipeline(made.transforms).rows(np.float32([[0.0], [0.08], [0.02]]), np.float32([[0.0], [1.0], [0.25]]))
    np.testing.assert_allclose(rows[0][:, 0], [1.0, 0.0, 0.75], atol=1e-6)
    np.testing.assert_allclose(rows[1][:, 0], [1.0, -1.0, 0.5], atol=1e-6)


@pytest.mark.parametrize("reference", ["delta_start", "delta_step"])
@pytest.mark.parametrize("frame", ["base", "tool"])
def test_the_delta_of_a_pose_is_composed_not_subtracted(frame, reference):
    """By the definition: what, applied to the pose that it begins at, gives the pose; against its formulas."""
    rng = np.random.default_rng(1)
    pose = [{"kind": "position", "unit": "m"}, {"kind": "rotation", "rotation": "euler_xyz", "unit": "rad"}]
    absolute = [{**part, "reference": "absolute"} for part in pose]
    state = np.concatenate([rng.normal(size=3), some(rng, (), "euler_xyz")]).astype(np.float32)
    actions = np.concatenate([rng.normal(size=(5, 3)), some(rng, (5,), "euler_xyz")], axis=-1).astype(np.float32)
    ask = {"reference": reference, "frame": frame}
    wanted = [{"kind": "position", **ask}, {"kind": "rotation", "rotation": "rot6d", **ask}]
    made = converted(convention(actions=absolute, state=pose), convention(actions=wanted))
    _, found = Pipeline(made.transforms).rows(state, actions)
    turn, moved = matrices(found[:, 3:], "rot6d"), found[:, :3].astype(np.float64)
    at, towards = state[:3].astype(np.float64), matrices(state[3:], "euler_xyz")
    for k in range(5):
        expected = matrices(actions[k, 3:], "euler_xyz")
        assert angle_between(towards @ turn[k] if frame == "tool" else turn[k] @ towards, expected) < 2e-6
        np.testing.assert_allclose(
            at + (towards @ moved[k] if frame == "tool" else moved[k]), actions[k, :3], atol=2e-6
        )
        if reference == "delta_step":
            at, towards = actions[k, :3].astype(np.float64), expected
    assert made.action_names[3:] == tuple(f"rotation.rot6d[{i}]" for i in range(6))
    assert made.state_names == tuple(f"state.{i}" for i in range(6))


def test_parts_are_chosen_and_ordered_by_name_and_come_back_in_the_datasets_order():
    names = (*(f"{part}[{i}]" for part in ("left", "right") for i in range(3)), "grip")
    declared = convention(
        actions=[
            {"kind": "joint", "name": "right", "dims": ["right*"], "unit": "deg"},
            {"kind": "joint", "name": "left", "dims": ["0:3"], "unit": "deg"},
            {"kind": "gripper", "dims": ["grip"]},
        ]
    )
    wanted = convention(
        actions=[{"kind": "gripper"}, {"kind": "joint", "name": "right", "dims": ["*[2]", "*[0]"], "unit": "rad"}]
    )
    made = conversions(declared, wanted, (), names, "main")
    assert made.action_names == ("grip", "right[2]", "right[0]") and made.robot_names == (
        "right[0]",
        "right[2]",
        "grip",
    )
    actions = np.arange(14, dtype=np.float32).reshape(2, 7)
    state, rows = Pipeline(made.transforms).rows(np.zeros((2, 0), np.float32), actions)
    np.testing.assert_allclose(rows, np.stack([actions[:, 6], *np.deg2rad(actions[:, [5, 3]].T)], axis=1), rtol=1e-6)
    np.testing.assert_allclose(
        Pipeline(made.transforms).units(rows, HEAD, state=state), actions[:, [3, 5, 6]], rtol=1e-6
    )


def test_what_is_not_wanted_costs_nothing():
    made = converted(convention(**ARM), Convention())
    assert made.transforms == {} and made.convention == convention(
        actions=[{**JOINTS, "name": "joint"}, {**GRIPPER, "name": "gripper", "dims": 1}],
        state=[{**JOINTS, "name": "joint"}, {**GRIPPER, "name": "gripper", "dims": 1}],
    )
    same = converted(convention(**ARM), convention(actions=[{"kind": "joint"}, {"kind": "gripper"}]))
    assert same.transforms == {}
    undeclared = conversions(Convention(), Convention(), ("s",), ("a",), "main")
    assert undeclared.transforms == {} and undeclared.convention == Convention()


def test_the_hash_is_of_what_is_said():
    one, other = convention(**ARM), convention(**ARM)
    assert one.digest() == other.digest() and len(one.digest()) == 16
    assert one.digest() != replace(one, state=None).digest()
    assert typed.build(Convention, json.loads(json.dumps(one.to_json())), "") == one


E_POSE = [{"kind": "position", "unit": "m"}, {"kind": "rotation", "rotation": "euler_xyz", "unit": "rad"}]


@pytest.mark.parametrize(
    ("declared", "wanted", "words", "remedy"),
    [
        ({}, {"actions": [{"kind": "joint"}]}, "doesn't say what its actions is", "list the parts"),
        ({"actions": [{"kind": "joint", "dims": 2}]}, {}, "in no part, or in two: actions.2", "list each once"),
        ({"actions": [{"kind": "joint", "dims": 4}]}, {}, "reaches to dimension 4, of 3", "give their number"),
        ({"actions": [{"kind": "joint", "dims": ["x"]}]}, {}, "no dimension is named 'x'", "name one of actions.0"),
        ({"actions": [{"kind": "rotation", "dims": 3, "rotation": "rot6d"}]}, {}, "which has 6 dimensions", "name 6"),
        (
            {"actions": [{"kind": "joint"}]},
            {"actions": [{"kind": "joint", "unit": "deg"}]},
            "needs .*unit",
            "set data.s",
        ),
        (
            {"actions": [{"kind": "joint", "unit": "rad"}]},
            {"actions": [{"kind": "joint", "unit": "mm"}]},
            "an angle in rad",
            "one of rad, deg",
        ),
        (
            {"actions": [{"kind": "joint", "unit": "rad", "reference": "absolute"}]},
            {"actions": [{"kind": "joint", "reference": "delta_start"}]},
            "the state, which has no such part",
            "name the state's part 'joint'",
        ),
        (
            {
                "actions": [{"kind": "joint", "unit": "rad", "reference": "absolute"}],
                "state": [{"kind": "joint", "unit": "deg"}],
            },
            {"actions": [{"kind": "joint", "reference": "delta_start"}]},
            "of another unit: rad and deg",
            "ask for one in data.convention.actions and .state",
        ),
        ({"actions": [{"kind": "joint", "reference": "delta_start"}]}, {}, "belongs to many chunks", "delta_step"),
        ({"actions": [{"kind": "joint"}]}, {"actions": [{"kind": "position"}]}, "has no part of", "it has joint"),
        (
            {"actions": [{"kind": "joint", "name": "arm"}]},
            {"actions": [{"kind": "other", "name": "arm"}]},
            "is a joint in .* and a other in",
            "different names",
        ),
        (
            {"actions": [{"kind": "joint"}]},
            {"actions": [{"kind": "joint", "dims": 4}]},
            "has 4 dimensions, and 'joint' of source 'main' has 3",
            "dims=3",
        ),
        (
            {"actions": [{**E_POSE[0], "reference": "absolute"}], "state": [E_POSE[0]]},
            {"actions": [{"kind": "position", "reference": "delta_start", "frame": "tool"}]},
            "no rotation that says how it stands",
            "frame to base",
        ),
        (
            {"actions": [{**E_POSE[0], "reference": "delta_step"}], "state": [E_POSE[0]]},
            {"actions": [{"kind": "position", "reference": "absolute"}]},
            "needs .*frame",
            "frame to what",
        ),
        (
            {"actions": [{"kind": "gripper", "dims": 3, "polarity": "open"}]},
            {"actions": [{"kind": "gripper", "polarity": "closed"}]},
            "needs .*range",
            "range to what",
        ),
    ],
)
def test_what_cannot_be_converted_is_an_error_with_a_remedy(declared, wanted, words, remedy):
    with pytest.raises(UserError, match=words) as caught:
        names = tuple(f"state.{i}" for i in range(3)), tuple(f"actions.{i}" for i in range(3))
        conversions(convention(**declared), convention(**wanted), *names, "main")
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"actions": [{"kind": "joint", "rotation": "rot6d"}]}, "rotation is of a rotation"),
        ({"actions": [{"kind": "joint", "unit": "none"}]}, "unit=none is none of a joint"),
        ({"actions": [{"kind": "rotation", "rotation": "rot6d", "unit": "deg"}]}, "unit=deg is none of rot6d"),
        ({"actions": [{"kind": "position", "frame": "tool", "reference": "absolute"}]}, "frame=tool is of a delta"),
        ({"actions": [{"kind": "gripper", "range": [1, 0]}]}, "range must rise"),
        ({"actions": [{"kind": "joint", "dims": 0}]}, "dims must be at least 1"),
        ({"actions": []}, "actions has no parts"),
        ({"state": [{"kind": "joint", "reference": "delta_step"}]}, "a state is absolute"),
        ({"state": [{"kind": "joint", "name": "a"}, {"kind": "other", "name": "a"}]}, "two parts .* named 'a'"),
        ({"actions": [{"kind": "joint", "unit": "degrees"}]}, "is not a choice"),
    ],
)
def test_a_part_that_means_nothing_is_refused_when_composed(parts, words):
    with pytest.raises(UserError, match=words) as caught:
        convention(**parts)
    assert caught.value.remedy


def test_deltas_without_a_state_have_no_meaning():
    made = converted(convention(**ARM), convention(actions=[{"kind": "joint", "reference": "delta_start"}]))
    with pytest.raises(UserError, match="without the state"):
        Pipeline(made.transforms).units(np.zeros((4, 7), np.float32), HEAD)
