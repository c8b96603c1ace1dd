"""What each mode sees, predicts and is trained on, sample by sample."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from opentau_train.config.data import DataSettings
from opentau_train.config.modes import MODES, FutureSettings
from opentau_train.errors import UserError
from opentau_train.models.draws import Draws
from opentau_train.models.flow import FlowPolicy
from opentau_train.models.future import EncodeMode
from opentau_train.models.layers import time_features
from opentau_train.models.wam import WamPolicy
from tests.nightly import at_night
from tests.unit.models import flow_cases
from tests.unit.models.wam_cases import NUM_VALUES, SPEC, TERMS, make_batch, make_policy

ACTIONS = ("wam", "inverse_dynamics", "policy")
HEADS = ("velocity_out", "bins_out", "future.out")


@pytest.fixture
def policy():
    return make_policy()


def draws(batch, index=0):
    return Draws(batch.key, index)


class Given(Draws):
    """The draws of the keys, with other ones by the name `other`, and flow times where they are given."""

    def __init__(self, keys, other: str = "", time: float | None = None):
        super().__init__(keys)
        self.other, self.time = other, time

    def normal(self, name, shape=()):
        return super().normal("another" if name == self.other else name, shape)

    def uniform(self, name, shape=()):
        given = super().uniform(name, shape)
        return given if self.time is None else torch.full_like(given, self.time)


def outputs(policy, batch, given=None):
    """{head: what it gives} in a forward pass."""
    seen = {}
    hooks = [
        policy.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        for name in HEADS
    ]
    with torch.no_grad():
        policy(batch, given or draws(batch))
    for hook in hooks:
        hook.remove()
    return seen


def other_future(batch):
    return batch.replace(future={camera: 255 - frames for camera, frames in batch.future.items()})


def with_future(batch):
    """The batch with all future frames of the cameras that a sample has, in the mode `policy` too."""
    there = {camera: batch.camera_mask[camera] for camera in batch.future}
    return batch.replace(future_mask=there, future_is_pad=torch.zeros_like(batch.future_is_pad))


def other_actions(batch):
    return batch.replace(actions=batch.actions + 1.0)


@pytest.mark.parametrize("seed", range(2))
def test_each_mode_supervises_its_terms_over_what_is_real(policy, seed):
    batch = make_batch(MODES * 3, seed=seed)
    batch.weight[5] = 0.0
    terms, counts = policy(batch, draws(batch)), policy.term_counts(batch)
    assert list(terms) == list(policy.loss_weights) == list(counts) == ["mse", "ce", "vision_mse"]
    frames = torch.stack(list(batch.future_mask.values())).sum(0) * (~batch.future_is_pad).sum(1)
    actions = (~batch.action_is_pad).sum(1) * batch.action_dim_mask.sum(1)
    for i, mode in enumerate(batch.mode):
        real = {"mse": actions, "ce": actions, "vision_mse": frames * NUM_VALUES}
        for term, (sums, number) in terms.items():
            wanted = int(real[term][i]) * (term in TERMS[mode]) * int(batch.weight[i])
            assert number[i] == counts[term][i] == wanted and bool(sums[i]) == (wanted > 0), (mode, term)


def test_vision_mse_is_the_error_of_the_velocity_times_t_squared_written_out_frame_by_frame(policy):
    batch = make_batch(["wam", "forward_dynamics"] * 2)
    given = draws(batch)
    out, sums = outputs(policy, batch)["future.out"], policy(batch, given)["vision_mse"][0]
    noise, time = given.normal("future", (2, 3, 6, 192)), given.uniform("future_time")
    out = out.view(4, 2, 3, 6, 192)
    for i in range(4):
        error = 0.0
        for c, camera in enumerate(SPEC.future_cameras):
            for f in range(3):
                if batch.future_is_pad[i, f] or not batch.future_mask[camera][i]:
                    continue
                for row, column in itertools.product(range(2), range(3)):
                    square = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
                    now, true = (
                        x[i, j, :, *square].flatten() / 127.5 - 1
                        for x, j in ((batch.images[camera], -1), (batch.future[camera], f))
                    )
                    drawn = noise[i, c, f, 3 * row + column]
                    noised = time[i] * drawn + (1 - time[i]) * true
                    velocity = (noised - (now + out[i, c, f, 3 * row + column])) / time[i]
                    error += (time[i] * (velocity - (drawn - true))).square().sum()
        torch.testing.assert_close(sums[i], torch.as_tensor(error), rtol=1e-4, atol=1e-3)


def test_policy_samples_lose_the_same_in_a_joint_batch_as_in_a_policy_run(policy):
    modes = ["policy", "wam", "policy", "forward_dynamics", "inverse_dynamics", "policy"]
    joint = policy(make_batch(modes), draws(make_batch(modes)))
    alone = policy(make_batch(["policy"] * 6), draws(make_batch(modes)))
    own = [i for i, mode in enumerate(modes) if mode == "policy"]
    for term in ("mse", "ce"):
        assert torch.equal(joint[term][0][own], alone[term][0][own]) and joint[term][0][own].all()
        assert torch.equal(joint[term][1][own], alone[term][1][own])
    few = make_batch(modes).rows(torch.tensor(own))
    for term, (sums, counts) in policy(few, draws(few)).items():
        torch.testing.assert_close(sums, joint[term][0][own], rtol=1e-6, atol=1e-6)
        assert torch.equal(counts, joint[term][1][own])


def test_a_policy_sample_loses_what_the_flow_policy_of_the_same_weights_does(policy):
    batch = make_batch(["policy"] * 4)
    flow = flow_cases.make_policy(dataclasses.replace(SPEC, future=0))
    flow.load_state_dict({k: v for k, v in policy.state_dict().items() if not k.startswith("future.")})
    for term, (sums, _) in flow(batch, draws(batch)).items():
        torch.testing.assert_close(policy(batch, draws(batch))[term][0], sums, rtol=1e-5, atol=1e-5)
    sampled = policy.sample_actions(batch, draws(batch))
    assert torch.equal(sampled, flow.sample_actions(batch, draws(batch)))


def test_without_future_frames_it_is_the_flow_policy():
    spec = dataclasses.replace(SPEC, future=0, future_cameras=(), modes=("policy",))
    ours, flow, batch = make_policy(spec), flow_cases.make_policy(spec), flow_cases.make_batch(spec)
    assert ours.loss_weights == flow.loss_weights and ours.wants() == flow.wants()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in flow.state_dict().items()}
    for term, (sums, _) in FlowPolicy.forward(ours, batch, draws(batch)).items():
        assert torch.equal(sums, ours(batch, draws(batch))[term][0])


# -- leaks: {mode: (what is hidden, the heads that must not move)} ----------------------------------------------------

LEAKS = {
    "policy": [
        ("the future", lambda b: (other_future(b), None), ("velocity_out", "bins_out")),
        ("the future's noise", lambda b: (b, Given(b.key, "future")), ("velocity_out", "bins_out")),
        ("the actions of the bins", lambda b: (other_actions(b), None), ("bins_out",)),
    ],
    "wam": [
        ("actions behind noise", lambda b: (other_actions(b), Given(b.key, time=1.0)), HEADS),
        ("the future behind noise", lambda b: (other_future(b), Given(b.key, time=1.0)), HEADS),
        ("noised actions of the bins", lambda b: (other_actions(b), None), ("bins_out",)),
        ("a noised future of the bins", lambda b: (other_future(b), None), ("bins_out",)),
    ],
    "forward_dynamics": [
        ("the future behind noise", lambda b: (other_future(b), Given(b.key, time=1.0)), HEADS),
        ("the actions' noise", lambda b: (b, Given(b.key, "actions")), HEADS),
        ("shown actions of the bins", lambda b: (other_actions(b), None), ("bins_out",)),
    ],
    "inverse_dynamics": [
        ("actions behind noise", lambda b: (other_actions(b), Given(b.key, time=1.0)), HEADS),
        ("the future's noise", lambda b: (b, Given(b.key, "future")), HEADS),
        ("a shown future of the bins", lambda b: (other_future(b), None), ("bins_out",)),
    ],
}
CASES = [pytest.param(m, *c[1:], id=f"{m}: {c[0]}") for m, cases in LEAKS.items() for c in cases]


@pytest.mark.parametrize(("mode", "change", "heads"), CASES)
def test_a_mode_does_not_see_what_it_must_predict(policy, mode, change, heads):
    batch = with_future(make_batch([mode] * 4))
    changed, given = change(batch)
    before = Given(batch.key, time=None if given is None else given.time)
    want, got = outputs(policy, batch, before), outputs(policy, changed, given)
    for head in heads:
        assert torch.equal(got[head], want[head]), head


SEES = {
    "wam": [(other_future, "velocity_out"), (other_actions, "future.out")],
    "forward_dynamics": [(other_actions, "future.out")],
    "inverse_dynamics": [(other_future, "velocity_out")],
}


@pytest.mark.parametrize(("mode", "change", "head"), [(m, *case) for m, cases in SEES.items() for case in cases])
def test_a_mode_sees_what_it_is_given(policy, mode, change, head):
    batch = make_batch([mode] * 4)
    assert not torch.allclose(outputs(policy, change(batch))[head], outputs(policy, batch)[head])


def test_what_is_shown_has_the_flow_time_0_and_is_clean(policy):
    batch = make_batch(["forward_dynamics", "inverse_dynamics"] * 2)
    seen = {}
    for name in ("action_in", "future.stem.convs.0"):
        policy.get_submodule(name).register_forward_hook(lambda _m, i, _o, name=name: seen.update({name: i[0]}))
    policy(batch, draws(batch))
    real = ~batch.action_is_pad[:, :, None] & batch.action_dim_mask[:, None]
    assert torch.equal(seen["action_in"][::2], torch.where(real, batch.actions, 0.0)[::2])
    frame = batch.future["left"][1, 0].float() / 127.5 - 1.0
    now = batch.images["left"][1, -1].float() / 127.5 - 1.0
    num = len(SPEC.future_cameras) * SPEC.future  # of a sample, the first one being its first camera's
    assert torch.equal(seen["future.stem.convs.0"][num], torch.cat([frame, now]))
    assert not torch.equal(seen["action_in"][1], batch.actions[1])


def test_times_are_shared_or_separate_and_shifted(policy):
    batch = make_batch(MODES)
    of = {}
    for shared in (True, False):
        policy = make_policy(shared_time=shared, future_time_shift=3.0)
        seen = []
        policy.time_in.register_forward_hook(lambda _m, i, _o, seen=seen: seen.append(i[0]))
        policy(batch, draws(batch))
        of[shared] = seen  # the features of the future's times, and of the actions'
    u, own = draws(batch).uniform("future_time"), draws(batch).uniform("time")
    shifted = 3 * u / (1 + 2 * u)
    zero = torch.zeros(4)
    predicts_future = torch.tensor([False, True, True, False])
    for shared, (future, actions) in of.items():
        assert torch.equal(future, time_features(torch.where(predicts_future, shifted, zero), 32))
        wam = shifted if shared else own
        want = torch.stack([own[0], wam[1], zero[0], own[3]])
        assert torch.equal(actions, time_features(want, 32))


@pytest.mark.parametrize("modes", [*([m] * 4 for m in MODES), list(MODES), ["policy", "wam", "policy", "wam"]])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_every_parameter_has_a_gradient_in_any_mix_of_modes(policy, modes, weight):
    batch = make_batch(modes, weight=torch.full((4,), weight))
    terms = policy(batch, draws(batch))
    sum(sums.sum() for sums, _ in terms.values()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert not parameter.grad.any() if weight == 0 else True
    if modes == list(MODES) and weight:
        assert all(p.grad.any() for p in policy.parameters())


def test_future_frames_that_are_not_there_change_nothing(policy):
    batch = make_batch(["wam"] * 4)
    real = ~batch.future_is_pad[:, :, None, None, None]
    there = {c: real & m[:, None, None, None, None] for c, m in batch.future_mask.items()}
    dirty = batch.replace(future={c: torch.where(there[c], f, 255 - f) for c, f in batch.future.items()})
    assert any(not torch.equal(dirty.future[c], batch.future[c]) for c in batch.future)
    for term, (sums, _) in policy(dirty, draws(batch)).items():
        assert torch.equal(sums, policy(batch, draws(batch))[term][0]), term


@pytest.mark.parametrize("index", range(4))
def test_a_sample_loses_the_same_alone(policy, index):
    batch = make_batch(["inverse_dynamics", "wam", "forward_dynamics", "policy"])
    together, row = policy(batch, draws(batch)), batch.rows(slice(index, index + 1))
    for term, (sums, counts) in policy(row, draws(row)).items():
        torch.testing.assert_close(sums, together[term][0][index : index + 1], rtol=1e-5, atol=1e-4)
        assert torch.equal(counts, together[term][1][index : index + 1])


# -- sampling ---------------------------------------------------------------------------------------------------------


def euler(policy, batch, steps):
    """Chunk and future [B, C, F, P, V] by Euler steps over the training's forward, read off its heads."""
    noise = draws(batch)
    chunk = torch.where(batch.action_dim_mask[:, None], noise.normal("actions", batch.actions.shape[1:]), 0.0)
    present, true = policy.future.read(batch)
    future = noise.normal("future", true.shape[1:])
    for step in range(steps):
        time = 1.0 - step / steps

        class At(Draws):
            def normal(self, name, shape=(), chunk=chunk, future=future, time=time):
                clean = {"actions": batch.actions, "future": true}[name]
                return ({"actions": chunk, "future": future}[name] - (1 - time) * clean) / time

            def uniform(self, name, shape=(), time=time):
                return torch.full((len(batch),), time)

        out = outputs(policy, batch, At(batch.key))
        clean = present + out["future.out"].view_as(true)
        future = future - (future - clean) / time / steps
        chunk = torch.where(batch.action_dim_mask[:, None], chunk - out["velocity_out"] / steps, 0.0)
    return chunk, future


def test_wam_samples_actions_and_future_together_by_euler_steps_over_the_training_forward():
    policy, batch = make_policy(num_flow_steps=4), make_batch(["wam"] * 2)
    whole = torch.zeros_like(batch.future_is_pad)
    seen = {c: torch.ones(2, dtype=torch.bool) for c in SPEC.cameras}
    batch = batch.replace(camera_mask=seen, future_mask=dict(seen), future_is_pad=whole)
    chunk, future = euler(policy, batch, 4)
    torch.testing.assert_close(policy.sample_actions(batch, draws(batch)), chunk, rtol=1e-4, atol=1e-4)
    sampled = policy.sample_future(batch, draws(batch))
    assert list(sampled) == list(SPEC.future_cameras) and sampled["left"].shape == (2, 3, 3, 16, 24)
    torch.testing.assert_close(
        torch.stack(list(sampled.values()), 1), policy.future.shown(future), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode", ACTIONS)
def test_sampled_actions_come_from_no_true_actions(policy, mode):
    batch = make_batch([mode] * 4)
    chunk = policy.sample_actions(batch, draws(batch))
    blind = other_actions(batch).replace(action_is_pad=torch.ones_like(batch.action_is_pad))
    assert torch.equal(policy.sample_actions(blind, draws(batch)), chunk)
    assert not torch.equal(policy.sample_actions(batch, draws(batch, 1)), chunk)
    assert torch.equal(chunk * ~batch.action_dim_mask[:, None], torch.zeros_like(chunk))
    batch = with_future(batch)
    moved, chunk = (policy.sample_actions(b, draws(batch)) for b in (other_future(batch), batch))
    assert torch.equal(moved, chunk) == (mode != "inverse_dynamics"), "only it is shown the future"


def test_the_sampled_future_follows_the_actions_that_are_shown(policy):
    batch = make_batch(["forward_dynamics", "wam"])
    first, blind = (policy.sample_future(b, draws(batch)) for b in (batch, other_future(batch)))
    moved = policy.sample_future(other_actions(batch), draws(batch))
    for camera, frames in first.items():
        assert frames.min() >= 0 and frames.max() <= 1 and torch.equal(blind[camera], frames)
        assert torch.equal(moved[camera][1], frames[1]), "wam samples actions of its own"
    assert not torch.equal(moved["left"][0], first["left"][0])


@pytest.mark.parametrize(("modes", "robot"), [(MODES, "policy"), (("wam", "forward_dynamics"), "wam"), ((), "policy")])
def test_a_robot_is_of_the_first_trained_mode_that_acts(modes, robot):
    wants = make_policy(dataclasses.replace(SPEC, modes=modes)).wants()
    assert wants.transforms["mode"] == EncodeMode(robot)
    assert EncodeMode(robot)({}, None)["mode_code"] == MODES.index(robot)
    assert EncodeMode(robot)({"mode": "inverse_dynamics"}, None)["mode_code"] == 3


def test_a_robots_batch_of_a_wam_policy_needs_no_future_frames(policy):
    batch = make_batch(["wam"] * 4)
    none = {c: torch.zeros_like(m) for c, m in batch.future_mask.items()}
    blank = {c: torch.zeros_like(f) for c, f in batch.future.items()}
    robot = batch.replace(future=blank, future_mask=none, future_is_pad=torch.ones_like(batch.future_is_pad))
    assert torch.equal(policy.sample_actions(robot, draws(batch)), policy.sample_actions(batch, draws(batch)))


def test_pictures_become_patches_and_again_pictures(policy):
    frames = make_batch().future["wrist"]
    assert torch.equal((policy.future_form(frames) * 255).round().to(torch.uint8), frames)
    torch.testing.assert_close(policy.future_form(frames), frames / 255, rtol=0, atol=1e-6)


def test_latents_of_a_frozen_encoder_are_predicted_in_place_of_pixels():
    policy, batch = make_policy(future_encoder="FILE", future_patch_size=16), make_batch(["wam", "forward_dynamics"])
    assert not policy.future_is_pixels and policy.future.grid == (1, 2)
    for parameter in policy.future.encoder.parameters():
        assert not parameter.requires_grad
        torch.nn.init.normal_(parameter, std=0.3)
    terms = policy(batch, draws(batch))
    form = policy.future_form(batch.future["left"])
    assert form.shape == (2, 3, 2, 96)
    torch.testing.assert_close(form.mean(-1), torch.zeros(2, 3, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(form.std(-1, correction=0), torch.ones(2, 3, 2), rtol=0, atol=1e-2)
    real = (torch.stack(list(batch.future_mask.values()), 1)[..., None] & ~batch.future_is_pad[:, None]).sum((1, 2))
    assert torch.equal(terms["vision_mse"][1], real * 2.0 * 96)
    assert policy.sample_future(batch, draws(batch))["wrist"].shape == (2, 3, 2, 96)
    sum(sums.sum() for sums, _ in terms.values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())


@at_night
def test_overfitted_modes_sample_what_they_were_shown():
    torch.set_num_threads(1)
    policy, batch = make_policy(), make_batch(["forward_dynamics", "inverse_dynamics", "wam", "policy"], seed=3)
    smooth = {
        c: F.avg_pool2d(f.flatten(0, 1).float(), 5, 1, 2).to(torch.uint8).view_as(f) for c, f in batch.future.items()
    }
    batch = batch.replace(future=smooth)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 1200)
        optimizer.zero_grad()
        flow_cases.total(policy, policy(batch, draws(batch, step))).backward()
        optimizer.step()
    real = ~batch.action_is_pad[:, :, None] & batch.action_dim_mask[:, None]
    error = (
        torch.where(real, policy.sample_actions(batch, draws(batch, 1 << 20)) - batch.actions, 0.0).square().sum((1, 2))
    )
    assert (error[1:] < 0.05 * real.sum((1, 2))[1:]).all(), error
    sampled = policy.sample_future(batch, draws(batch, 1 << 20))["left"][0]
    true, now = (policy.future_form(x)[0] for x in (batch.future["left"], batch.images["left"][:, -1:]))
    assert (sampled - true).square().mean() < 0.2 * (now - true).square().mean()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"future_patch_size": 12}, "must be a power of 2"),
        ({"future_patch_size": 1}, "must be a power of 2"),
        ({"future_patch_size": 32}, "aren't made of whole patches of 32x32"),
    ],
)
def test_patches_that_pictures_are_not_made_of_are_refused(options, said):
    data = dataclasses.replace(DataSettings(), image_size=(48, 80), future=FutureSettings(num_frames=2))
    with pytest.raises(UserError, match=said):
        WamPolicy.check(options, data)
