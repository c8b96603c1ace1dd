"""What the linter says of generated sources whose conventions are known, and of data that tell nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.support.arms import Arm, declared
from benchmarks.support.case import WHERE, Case, generated
from benchmarks.support.cases import CASES
from opentau_train.data.builtin import droid
from opentau_train.data.convention import Convention, Part
from opentau_train.data.lint import episodes, motion, units
from opentau_train.data.lint.judge import LEAST_ROWS, judge
from opentau_train.data.lint.sample import EpisodeSample
from opentau_train.errors import UserError

SEED = 5
"""A source whose gripper meets objects, and whose cameras' views differ."""


DOUBTED = {
    "clean: nothing held, hands begin closed": {"polarity"},
    "clean: a hand that turns about the base's x axis": {"rotation"},
}
"""What is usual and not so here."""


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", [c for c in CASES if c.asked], ids=lambda c: c.name)
def test_what_is_planted_is_found_as_far_as_the_data_allow_and_nothing_else_is(case):
    judged = case.judged(SEED)
    assert case.read(judged) == case.allowed
    assert [v for v in judged.verdicts if v.answer == "contradiction" and not case.is_planted(v)] == []


@pytest.mark.parametrize("case", [c for c in CASES if not c.asked], ids=lambda c: c.name)
def test_a_source_that_is_declared_rightly_is_contradicted_in_nothing(case):
    judged = case.judged(SEED)
    assert [v for v in judged.verdicts if v.answer == "contradiction"] == []
    doubted = {v.finding.name for v in judged.verdicts if v.answer == "doubt"}
    assert doubted == DOUBTED.get(case.name, set())
    agreed = {v.finding.name for v in judged.verdicts if v.answer == "agree"}
    assert {"rate", "reference", "range"} <= agreed
    told = {v.finding.name: v.finding.value for v in judged.verdicts}
    assert (told["motion"], told["duplicates"]) == ("moving", "none")
    assert "clipped" not in [v.finding.value for v in judged.verdicts]


@pytest.mark.parametrize(
    "name", ["radians, declared degrees", "absolute, declared a delta", "gripper inverted, objects held"]
)
def test_a_contradiction_names_the_key_and_what_to_write_there(name):
    case = named(name)
    (wrong,) = [v for v in case.judged(SEED).verdicts if v.answer == "contradiction" and v.where.endswith(case.asked)]
    truth, _, facet = wrong.where.rpartition(".")
    vector, place = truth.removeprefix(f"{WHERE}.convention.").removesuffix("]").split("[")
    right = getattr(getattr(declared(Arm(SEED, **case.arm)), vector)[int(place)], facet)
    assert wrong.remedy == f"set {wrong.where}: {right}"


def test_dimensions_of_another_unit_are_named_for_a_part_of_their_own():
    wrong = [v for v in named("one joint in degrees").judged(SEED).verdicts if v.answer == "contradiction"]
    assert {v.where.rpartition(".")[0] for v in wrong} == {f"{WHERE}.convention.{v}[0]" for v in ("state", "actions")}
    for verdict in wrong:
        assert verdict.remedy == f"give {verdict.finding.dims[0]} a part of their own, with unit: deg"


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("degrees' differences, declared radians", 14),  # steps of 6.3 degrees are no turns
        ("gripper in [0, 1], declared [0, 100]", 10),  # every grasp meets an object
        ("2 % of the actions' span cut off at each end", 13),  # at 10 Hz no dimension arrives three times
        ("cameras swapped in some episodes", 6),  # the views are alike
        ("gripper inverted, nothing held", 1),  # no episode begins at the very end
    ],
)
def test_what_shows_little_is_found(name, seed):
    assert named(name).read(named(name).judged(seed)) == named(name).allowed


def test_steps_in_the_tools_axes_are_proposed_as_such():
    judged = judge(generated(Arm(SEED, space="pose", reference="command_delta", frame="tool")), Convention(), WHERE)
    proposed = judged.declare.partition("actions:")[2]
    for kind in ("position", "rotation"):
        assert f"{{kind:{kind},dims:3,frame:tool,reference:delta_step}}" in proposed


@pytest.mark.parametrize("down", [True, False])
def test_differences_of_angles_say_nothing_of_their_order_nor_of_axes(down):
    sample = generated(Arm(SEED, space="pose", rotation="euler_zyx", down=down))
    turns = motion.turns_of(sample.state)
    steps = [np.diff(motion.unwrapped(s, turns), axis=0, append=s[-1:]) for s in sample.state]
    steps = [np.concatenate([d[:-1], 0 * d[-1:]]) for d in steps]
    actions = [np.column_stack([d[:, :6], a[:, 6:]]) for d, a in zip(steps, sample.actions, strict=True)]
    moved = {"reference": "delta_step"}
    convention = declared(Arm(SEED, space="pose", rotation="euler_zyx", down=down))
    parts = [replace(p, **moved) if p.kind != "gripper" else p for p in convention.actions or ()]
    judged = judge(replace(sample, actions=actions), replace(convention, actions=tuple(parts)), WHERE)
    assert [v for v in judged.verdicts if v.answer in ("contradiction", "doubt")] == []


def noise(seed: int, rows: int = 300) -> EpisodeSample:
    """Eight dimensions of state and of actions that have nothing to do with one another."""
    rng = np.random.default_rng(seed)
    names = [*(f"joint_position[{i}]" for i in range(7)), "gripper_position[0]"]
    state, actions = ([rng.normal(size=(rows // 3, 8)) for _ in range(3)] for _ in range(2))
    return EpisodeSample(
        fps=15.0,
        state_names=tuple(f"observation.state.{n}" for n in names),
        action_names=tuple(f"action.{n}" for n in names),
        numbers=(0, 1, 2),
        state=state,
        actions=actions,
    )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), convention=st.sampled_from(["delta_step", "absolute"]))
def test_noise_neither_agrees_with_a_declaration_nor_contradicts_it(seed, convention):
    parts = (Part("joint", dims=7, reference=convention, unit=None), Part("gripper", polarity="open"))
    judged = judge(noise(seed), Convention(actions=parts), WHERE)
    assert {v.answer for v in judged.verdicts if v.finding.name in ("reference", "polarity", "gripper direction")} <= {
        "unknown"
    }
    assert {v.finding.value for v in judged.verdicts if v.finding.name == "lag"} == {"unknown"}
    assert [v for v in judged.verdicts if v.answer == "contradiction"] == []


def test_of_few_rows_nothing_is_said():
    assert judge(noise(0, LEAST_ROWS - 20), Convention(), WHERE).verdicts == ()


def test_a_robot_that_rests_says_nothing_of_its_actions():
    still = noise(0)
    still = replace(
        still, state=[np.ones_like(s) for s in still.state], actions=[np.ones_like(a) for a in still.actions]
    )
    judged = judge(still, Convention(), WHERE)
    assert {v.finding.value for v in judged.verdicts if v.finding.name in ("reference", "lag")} == {"unknown"}
    assert ("motion", "idle") in {(v.finding.name, v.finding.value) for v in judged.verdicts}


def test_a_source_without_state_is_judged_by_its_actions():
    sample = generated(Arm(SEED))
    sample = replace(sample, state_names=(), state=[s[:, :0] for s in sample.state])
    judged = judge(sample, Convention(actions=declared(Arm(SEED)).actions), WHERE)
    assert {v.answer for v in judged.verdicts if v.finding.name == "range"} == {"agree"}
    assert "reference" not in {v.finding.name for v in judged.verdicts}


def test_a_convention_that_does_not_fit_the_dimensions_is_an_error():
    with pytest.raises(UserError, match="dimensions are in no part"):
        judge(generated(Arm(SEED)), Convention(actions=(Part("joint", dims=7),)), WHERE)


def test_chunks_that_are_placed_by_time_need_no_rate():
    case = named("rows 10 % faster than the rate")
    sample = generated(Arm(SEED, **case.arm))
    by_time = judge(sample, declared(Arm(SEED)), WHERE, by_time=True)
    assert [v for v in by_time.verdicts if v.answer == "contradiction"] == []


def test_velocity_columns_pair_with_the_positions_at_their_places():
    sample = generated(Arm(SEED, reference="state_delta"))
    names = tuple(name.replace("joint_position", "joint_velocity") for name in sample.action_names)
    follow = motion.following(replace(sample, action_names=names))
    assert follow.kind[:7] == [motion.DELTA] * 7


def test_joints_in_per_cent_of_their_ranges_are_not_called_degrees():
    rows = np.random.default_rng(0).uniform(-1, 1, (500, 6))
    assert [f.value for f in units.units("angle", tuple("abcdef"), 100 * rows)] == ["unknown"]
    assert [f.value for f in units.units("angle", tuple("abcdef"), 120 * rows)] == ["deg"]


def test_a_lift_in_metres_is_no_angle():
    sample = generated(Arm(SEED))
    parts = (Part("joint", dims=7, unit="m"), Part("gripper"))
    told = [v.finding.value for v in judge(sample, Convention(state=parts), WHERE).verdicts if v.finding.name == "unit"]
    assert told[0] in ("m", "unknown")


@pytest.mark.parametrize("pause", [0.0, 30.0])
def test_a_pause_in_an_episode_is_no_other_rate(pause):
    sample = noise(0)
    seconds = np.arange(100) / 15 + pause * (np.arange(100) > 40)
    finding = episodes.rate(replace(sample, seconds=[seconds] * 3))
    assert finding.value == ("15" if not pause else "unknown")


def test_joints_that_hardly_move_have_no_unit():
    rows = np.random.default_rng(0).normal(0, 0.02, (500, 7))
    assert [f.value for f in units.units("angle", tuple("abcdefg"), rows)] == ["unknown"]


def test_the_built_in_sample_is_judged_as_it_is():
    plans = [droid.plan(droid.SampleSpec(), "joint", episode) for episode in range(4)]
    names = [*(f"joint_{i}" for i in range(7)), "gripper"]
    sample = EpisodeSample(
        fps=15.0,
        state_names=tuple(f"observation.state.{name}" for name in names),
        action_names=tuple(f"action.{name}" for name in names),
        numbers=tuple(range(4)),
        state=[plan.measured for plan in plans],
        actions=[plan.command[1:] for plan in plans],
    )
    judged = judge(sample, Convention(), WHERE)
    assert {v.answer for v in judged.verdicts} == {"note", "unknown"}
    told = {v.finding.name: v.finding.value for v in judged.verdicts if v.finding.is_known}
    assert told | {"reference": "absolute", "unit": "rad", "lag": "1", "range": "[0,1]"} == told
