"""Chunks become actions one at a time: in parts, averaged, or computed while the robot moves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opentau_train import load_policy, rng
from opentau_train.deploy.limits import Limits, UnsafeActions
from opentau_train.deploy.realtime import Reach, Tail, tail_of
from opentau_train.errors import UserError
from opentau_train.models.act import TemporalEnsemble
from opentau_train.models.policy import Policy
from tests.program import TINY_POLICY, train_here
from tests.unit.data.mixture.test_conventions import DELTA_HAND, HAND, declare, hand, said, stored


@pytest.fixture(scope="module")
def observations(policy):
    random = np.random.default_rng(0)
    picture = lambda: random.integers(0, 256, (64, 96, 3), np.uint8)  # noqa: E731
    return [{"front": picture(), "side": picture(), "state": random.normal(size=4), "task": "go"} for _ in range(20)]


def with_history(observations, step):
    """The observation of a step with its own and the one before it."""
    both = [observations[max(0, step - 1)], observations[step]]
    return {**both[1], **{camera: np.stack([o[camera] for o in both]) for camera in ("front", "side")}}


def planned(policy, observations, step, number, seed=7):
    return policy.act(with_history(observations, step), seed=rng.fold_one(seed, number))


def played(stream, observations):
    return np.stack([stream.step(observation) for observation in observations])


def test_a_horizon_executes_the_first_actions_of_each_chunk(policy, observations):
    stream = policy.stream(horizon=3, seed=7)
    actions = played(stream, observations)
    for number, start in enumerate(range(0, 20, 3)):
        chunk = planned(policy, observations, start, number)
        np.testing.assert_array_equal(actions[start : start + 3], chunk[: len(actions[start : start + 3])])
    assert stream.num_plans == 7
    stream.reset()
    np.testing.assert_array_equal(played(stream, observations[:5]), actions[:5])
    assert policy.stream().execution.horizon == 8 == policy.chunk_length


def test_an_ensemble_averages_what_all_chunks_say_as_act_does(policy, observations):
    actions = played(policy.stream(ensemble=0.3, seed=7), observations[:10])
    average = TemporalEnsemble(0.3)
    for step, action in enumerate(actions):
        chunk = torch.from_numpy(planned(policy, observations, step, step))
        np.testing.assert_array_equal(action, average.update(chunk[None])[0].numpy())


def test_a_camera_that_misses_a_step_shows_its_last_picture_before(policy, observations):
    stream = policy.stream(horizon=1)
    for number in (0, 1):
        left = {k: v for k, v in observations[number].items() if number == 0 or k != "side"}
        stream.step(left)
    seen = stream._with_history(observations[2])
    for camera, before in (("side", 0), ("front", 1)):
        both = np.stack([observations[before][camera], observations[2][camera]])
        np.testing.assert_array_equal(seen["images"][camera], both)


def test_in_real_time_the_last_chunk_is_executed_until_the_next_is_there(policy, observations):
    """The new one is of the observation at its start, is used `realtime` steps later, and begins near the old one."""
    stream = policy.stream(horizon=4, realtime=2, seed=7)
    actions = played(stream, observations[:12])
    first = planned(policy, observations, 0, 0)
    np.testing.assert_array_equal(actions[:6], first[:6])  # 4, and 2 more while the next one is computed
    second = stream.policy.in_units(stream._plan.chunk, stream._plan.batch)[0]
    np.testing.assert_array_equal(actions[10:12], second[2:4])
    assert stream.num_plans == 3


def test_a_led_chunk_stays_with_the_last_one_where_it_must(policy, observations):
    """Beside chunks of the same noise that nothing leads. On three of the policy's own chunks: the weights fall."""
    for seed in range(3):
        led = policy.stream(horizon=4, realtime=2, seed=seed, steps=20)
        played(led, observations[:7])
        free = (
            planned(policy, observations, 4, 1, seed)
            if seed
            else policy.act(with_history(observations, 4), seed=rng.fold_one(seed, 1), steps=20)
        )
        last = policy.act(with_history(observations, 0), seed=rng.fold_one(seed, 0), steps=20)
        new = led._plan.actions
        apart = [np.abs(chunk[:4] - last[4:8]).mean(1) for chunk in (new, free)]
        assert (apart[0][:2] < 0.35 * apart[1][:2]).all(), apart


def test_the_weights_are_the_papers():
    weights = Reach(8, 3, 2).weights()
    share = (5 - np.arange(2, 5)) / (5 - 2 + 1)
    np.testing.assert_allclose(weights[2:5], share * (np.exp(share) - 1) / (np.e - 1), rtol=1e-6)
    assert weights[:2].tolist() == [1, 1] and weights[5:].tolist() == [0, 0, 0]


def test_a_tail_leads_a_known_flow_to_itself():
    """Of the velocity that leads everything to 0, the only led coordinates are the weighted ones."""
    tail = Tail(torch.full((1, 4, 2), 3.0), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    x, num = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)), 50
    lead = tail.lead(lambda x, time: x / time[:, None, None])
    for step in range(num):
        x = x - lead(x, torch.full((1,), 1 - step / num)) / num
    np.testing.assert_allclose(x[0, 2:], 0, atol=1e-5)
    np.testing.assert_allclose(x[0, :, 2], 0, atol=1e-5)


@pytest.fixture(scope="module")
def delta_policy(tmp_path_factory):
    """Of poses as deltas against the chunk's start, each step normalised by itself."""
    folder = tmp_path_factory.mktemp("deltas")
    words = ["+recipe=lerobot", f"data.sources.main.root={stored(folder / 'set', hand(3))}", "data.chunk_length=8"]
    words += [
        *TINY_POLICY,
        "data.num_workers=0",
        "trainer.global_batch_size=4",
        "trainer.steps=1",
        "validation.every=0",
    ]
    words += [*declare("main", HAND), said("data.convention.actions", DELTA_HAND), "scheduler.warmup_steps=0"]
    return load_policy(train_here([*words, "data.normalization_per_timestep=true"], folder / "run"))


@pytest.mark.slow
def test_what_is_left_of_a_chunk_of_deltas_is_the_same_poses_from_the_new_state(delta_policy):
    """Its poses go through the transforms to normalised deltas and back from another state."""
    policy, random = delta_policy, np.random.default_rng(1)
    states = hand(3)["state"][0][[2, 5]]
    before, now = (policy.batch([{"state": state}], policy.norm_heads[0]) for state in states)
    chunk = torch.from_numpy(random.normal(size=(1, 8, policy.loaded.spec.action_dim)).astype(np.float32))
    poses = policy.in_units(chunk, before)[0]
    tail = tail_of(policy.loaded.pipelines[policy.norm_heads[0]], (before, chunk), now, Reach(8, 3, 1))
    again = policy.in_units(tail.actions, now)[0]
    np.testing.assert_allclose(again[:5, [0, 1, 2, 6]], poses[3:, [0, 1, 2, 6]], atol=1e-4)
    assert (tail.actions[0, :5] - chunk[0, 3:]).abs().max() > 0.1, "from another state they are other numbers"


def test_deltas_are_poses_on_the_robot(delta_policy):
    robot = delta_policy.robot()
    assert len(robot.action_names) == 7 == len(robot.state_names)
    assert [part.kind for part in delta_policy.convention.actions] == ["position", "rotation", "gripper"]
    same = {"actions": HAND, "state": HAND}
    assert delta_policy.for_robot(fps=robot.fps * 1.001, convention=same).norm_head == robot.norm_head
    degrees = {"actions": [HAND[0], {**HAND[1], "unit": "deg"}, HAND[2]]}
    with pytest.raises(UserError, match="unit of dimension 3 is rad and deg") as caught:
        delta_policy.for_robot(convention=degrees)
    assert "data.sources.NAME.convention" in caught.value.remedy
    with pytest.raises(UserError, match="takes 5 actions a second, and the policy was trained on"):
        delta_policy.for_robot(fps=5)


def test_another_convention_than_nobody_declared_is_refused(policy):
    with pytest.raises(UserError, match="of them nothing is declared"):
        policy.for_robot(convention={"actions": [{"kind": "joint"}]})


@pytest.mark.parametrize(
    ("options", "words", "remedy"),
    [
        ({"horizon": 9}, "horizon=9: a chunk has 8 steps", "between 1 and 8"),
        ({"horizon": 0}, "horizon=0", "between 1 and 8"),
        ({"horizon": 3, "ensemble": 0.1}, "an ensemble asks for a chunk at every step", "leave out horizon"),
        ({"realtime": 2, "ensemble": 0.1}, "an ensemble asks for a chunk at every step", "realtime"),
        ({"realtime": 5}, "realtime=5: of a chunk's 8 steps", "between 0 and 4"),
        ({"realtime": -1}, "realtime=-1", "between 0 and 4"),
        ({"horizon": 7, "realtime": 2}, "horizon=7: a chunk has 8 steps, and realtime=2", "between 2 and 6"),
    ],
)
def test_what_does_not_go_together_is_refused(policy, options, words, remedy):
    with pytest.raises(UserError) as caught:
        policy.stream(**options)
    assert words in caught.value.what and remedy in caught.value.remedy


class Still(Policy):
    """A policy that makes its chunk at once."""

    def __init__(self, spec):
        super().__init__()
        self.spec, self.loss_weights = spec, {"mse": 1.0}

    def blocks(self):
        return []

    def term_counts(self, batch):
        return {"mse": torch.zeros(len(batch))}

    def forward(self, batch, draws):
        return {"mse": (torch.zeros(len(batch)), torch.zeros(len(batch)))}

    def sample_actions(self, batch, draws):
        return torch.zeros(len(batch), self.spec.chunk_length, self.spec.action_dim)


def test_a_policy_without_flow_says_why_it_has_no_real_time(policy, observations):
    still = replace(policy, loaded=replace(policy.loaded, policy=Still(policy.loaded.spec)))
    with pytest.raises(UserError, match="Still has no flow"):
        still.stream(realtime=1)
    with pytest.raises(UserError, match="Still doesn't sample in steps") as caught:
        still.stream(steps=3).step(observations[0])
    assert caught.value.remedy == "leave steps out"
    assert still.stream(horizon=2).step(observations[0]).shape == (3,)
    latency = still.benchmark(repeats=1)
    assert latency.num_steps == 0 and latency.steps == 0.0 < latency.prefix


def test_refused_actions_leave_a_stream_that_begins_anew(policy, observations, monkeypatch):
    stream = policy.stream(horizon=4, realtime=2, limits=Limits("refuse", margin=100.0))
    played(stream, observations[:4])
    whole = policy.loaded.policy.velocity
    monkeypatch.setattr(policy.loaded.policy, "velocity", lambda *given: whole(*given) * np.nan)
    played(stream, observations[4:6])
    with pytest.raises(UnsafeActions, match="aren't finite"):
        stream.step(observations[6])
    monkeypatch.undo()
    assert np.isfinite(played(stream, observations[7:])).all()


def test_the_latency_of_each_part_is_told(policy):
    latency = policy.benchmark(steps=3, repeats=2)
    assert latency.num_steps == 3 and min(latency.preprocess, latency.prefix, latency.steps, latency.units) > 0
    assert latency.total == latency.preprocess + latency.prefix + latency.steps + latency.units
    assert "3 steps" in str(latency) and "a chunk of 8 steps lasts 267 ms" in str(latency)
    with pytest.raises(UserError, match="repeats=0"):
        policy.benchmark(repeats=0)
