"""The policy's contract: per-sample sums and counts that nothing but the sample's own real entries can change."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opentau_train.errors import UserError
from tests.unit.models.flow_cases import SPEC, Noise, make_batch, make_noise, make_policy, total


def assert_same_terms(got, want, atol=1e-6, rtol=1e-5):
    for term, (sums, counts) in want.items():
        torch.testing.assert_close(got[term][0], sums, atol=atol, rtol=rtol)
        assert torch.equal(got[term][1], counts)


def reference_terms(policy, batch, noise):
    """The two losses written out element by element, on the outputs of the heads taken with hooks."""
    outputs = {}
    hooks = [
        policy.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
        for name in ("velocity_out", "bins_out")
    ]
    with torch.no_grad():
        policy(batch, noise)
    for hook in hooks:
        hook.remove()
    num, steps, dims = batch.actions.shape
    logits = outputs["bins_out"].double().reshape(num, steps, dims, 256)
    mse, ce = torch.zeros(num, dtype=torch.double), torch.zeros(num, dtype=torch.double)
    for b in range(num):
        for t in range(steps):
            for a in range(dims):
                if batch.action_is_pad[b, t] or not batch.action_dim_mask[b, a]:
                    continue
                action = float(batch.actions[b, t, a])
                mse[b] += (float(outputs["velocity_out"][b, t, a]) - (float(noise.noise[b, t, a]) - action)) ** 2
                edges = [-3 + 6 * i / 256 for i in range(257)]
                inside = min(max(action, -3.0), 3.0)
                place = max(i for i in range(256) if edges[i] <= inside)
                ce[b] += logits[b, t, a].logsumexp(0) - logits[b, t, a, place]
    return mse, ce


def test_terms_equal_an_element_by_element_reference(policy):
    batch = make_batch()
    batch.actions[0, 0, :] = torch.tensor([-7.0, 7.0, -3.0, 3.0])
    noise = make_noise(batch)
    terms = policy(batch, noise)
    mse, ce = reference_terms(policy, batch, noise)
    torch.testing.assert_close(terms["mse"][0].double(), mse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(terms["ce"][0].double(), ce, atol=1e-4, rtol=1e-5)


def test_network_sees_the_interpolation_between_noise_and_actions(policy):
    batch = make_batch(num=2)
    noise = make_noise(batch)
    seen = []
    handle = policy.action_in.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    policy(batch, noise)
    handle.remove()
    for b in range(2):
        t = float(noise.time[b])
        torch.testing.assert_close(seen[0][b], t * noise.noise[b] + (1 - t) * batch.actions[b])


@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_term_counts_and_the_real_entries(policy, seed):
    modes = ["policy", "inverse_dynamics", "forward_dynamics", "policy"]
    batch = make_batch(seed=seed, mode=modes, weight=torch.tensor([1.0, 1, 1, 0]))
    counts = policy.term_counts(batch)
    terms = policy(batch, make_noise(batch))
    assert list(terms) == list(counts) == list(policy.loss_weights)
    assert {t: c.tolist() for t, c in counts.items()} == {"mse": [24, 24, 0, 0], "ce": [24, 0, 0, 0]}
    for term, (sums, count) in terms.items():
        assert torch.equal(count, counts[term]) and sums.dtype == count.dtype == torch.float32
        assert torch.equal(sums == 0, count == 0)


def test_garbage_in_padded_entries_changes_nothing(policy):
    batch = make_batch()
    noise = make_noise(batch)
    want = policy(batch, noise)
    want_gradient = torch.autograd.grad(total(policy, want), list(policy.parameters()))

    real = ~batch.action_is_pad[:, :, None] & batch.action_dim_mask[:, None, :]
    garbage = torch.full_like(batch.actions, float("nan"))
    garbage[:, ::2] = 1e30
    dirty = batch.replace(
        actions=torch.where(real, batch.actions, garbage),
        state=torch.where(batch.state_dim_mask, batch.state, float("nan")),
        images={
            c: torch.where(batch.camera_mask[c][:, None, None, None, None], i, 255 - i) for c, i in batch.images.items()
        },
    )
    got = policy(dirty, Noise(torch.where(real, noise.noise, float("inf")), noise.time))
    assert_same_terms(got, want)
    for g, w in zip(torch.autograd.grad(total(policy, got), list(policy.parameters())), want_gradient, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-4)


def test_longer_prompt_budget_changes_nothing_for_short_prompts():
    short, long = make_policy(max_prompt_bytes=32), make_policy(max_prompt_bytes=64)
    state = short.state_dict()
    state["prompt_embed"] = torch.cat([state["prompt_embed"], torch.randn(8, 32)])
    long.load_state_dict(state)
    batch, wide = make_batch(num=3), make_batch(num=3, num_bytes=64)
    assert_same_terms(long(wide, make_noise(batch)), short(batch, make_noise(batch)))


@pytest.mark.parametrize("seed", range(2))
def test_sample_loses_the_same_alone_and_in_any_batch(policy, seed):
    batch = make_batch(num=5, seed=seed)
    noise = make_noise(batch)
    together = policy(batch, noise)
    for i, alone in enumerate(batch.split(1)):
        part = policy(alone, Noise(noise.noise[i : i + 1], noise.time[i : i + 1]))
        assert_same_terms(part, {t: (s[i : i + 1], c[i : i + 1]) for t, (s, c) in together.items()}, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("changes", "silent"),
    [
        ({"weight": torch.zeros(4)}, ("mse", "ce")),
        ({"mode": ["inverse_dynamics"] * 4}, ("ce",)),
        ({"mode": ["forward_dynamics"] * 4}, ("mse", "ce")),
        ({"action_is_pad": torch.ones(4, 6, dtype=torch.bool)}, ("mse", "ce")),
    ],
)
def test_unsupervised_term_is_exactly_zero_and_gives_no_gradient(policy, changes, silent):
    batch = make_batch(**changes)
    terms = policy(batch, make_noise(batch))
    for term, (sums, counts) in terms.items():
        assert (not sums.any() and not counts.any()) == (term in silent)
    for term in silent:
        gradients = torch.autograd.grad(terms[term][0].sum(), list(policy.parameters()), retain_graph=True,
                                        materialize_grads=True)  # fmt: skip
        assert not any(g.any() for g in gradients)


def test_fillers_leave_the_gradient_of_the_others_untouched(policy):
    batch = make_batch()
    noise = make_noise(batch)
    filled = batch.replace(weight=torch.tensor([1.0, 1, 0, 0]), actions=batch.actions.clone())
    filled.actions[2:] = float("nan")
    total(policy, policy(filled, noise)).backward()
    with_fillers = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    total(policy, policy(next(batch.split(2)), Noise(noise.noise[:2], noise.time[:2]))).backward()
    for got, parameter in zip(with_fillers, policy.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=1e-6, rtol=1e-4)


def test_binned_head_does_not_see_the_noised_actions(policy):
    batch = make_batch()
    a, b = policy(batch, make_noise(batch, 1)), policy(batch, make_noise(batch, 2))
    assert torch.equal(a["ce"][0], b["ce"][0])
    assert not torch.allclose(a["mse"][0], b["mse"][0])


def test_flow_head_does_not_see_the_bin_queries(policy):
    batch = make_batch()
    before = policy(batch, make_noise(batch))
    with torch.no_grad():
        policy.bin_embed.add_(torch.randn_like(policy.bin_embed))
    after = policy(batch, make_noise(batch))
    torch.testing.assert_close(after["mse"][0], before["mse"][0], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(after["ce"][0], before["ce"][0])


def changed(batch, what: str):
    """The batch with one input changed."""
    if what == "prompt":
        return make_batch(num=len(batch), prompt=["take it"] * len(batch))
    if what == "state":
        return batch.replace(state=batch.state + 1)
    images = {c: i.clone() for c, i in batch.images.items()}
    images["wrist"][:, 0 if what == "history" else -1] ^= 255
    return batch.replace(images=images)


@pytest.mark.parametrize("what", ["image", "history", "state", "prompt"])
def test_every_input_reaches_both_heads(policy, what):
    batch = make_batch(num=1)
    with torch.no_grad():
        before, after = policy(batch, make_noise(batch)), policy(changed(batch, what), make_noise(batch))
    for term in before:
        assert abs(float(after[term][0] - before[term][0])) > 1e-5


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        dataclasses.replace(SPEC, state_dim=0),
        dataclasses.replace(SPEC, cameras=()),
        dataclasses.replace(SPEC, cameras=(), state_dim=0),
        dataclasses.replace(SPEC, history=0, chunk_length=1, action_dim=1),
    ],
)
def test_every_parameter_gets_a_finite_gradient(spec):
    policy = make_policy(spec)
    batch = make_batch(spec)
    total(policy, policy(batch, make_noise(batch))).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("mode", ["policy", "inverse_dynamics", "forward_dynamics"])
def test_every_parameter_is_in_the_graph_of_every_batch(policy, mode):
    absent = torch.zeros(2, dtype=torch.bool)
    batch = make_batch(
        num=2,
        mode=[mode] * 2,
        prompt=["", ""],
        camera_mask={c: absent for c in SPEC.cameras},
        state_dim_mask=torch.zeros(2, 5, dtype=torch.bool),
    )
    terms = policy(batch, make_noise(batch))
    sum(sums.sum() for sums, _ in terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_no_inputs_need_no_parameters():
    names = {name for name, _ in make_policy(dataclasses.replace(SPEC, cameras=(), state_dim=0)).named_parameters()}
    assert not any(name.startswith(("stem", "camera", "frame", "patch", "state")) for name in names)


def test_bf16_autocast_gives_finite_float32_losses(policy):
    batch = make_batch()
    noise = make_noise(batch)
    exact = policy(batch, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = policy(batch, noise)
        actions = policy.sample_actions(batch, noise)
    assert actions.dtype == torch.float32 and actions.isfinite().all()
    for term, (sums, _) in rounded.items():
        assert sums.dtype == torch.float32 and sums.isfinite().all()
        torch.testing.assert_close(sums, exact[term][0], atol=0.5, rtol=0.05)
    total(policy, rounded).backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_same_seed_builds_the_same_policy():
    a, b, c = make_policy(seed=1), make_policy(seed=1), make_policy(seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.velocity_out.weight, c.velocity_out.weight)


@pytest.mark.parametrize(
    "changes", [{"heads": 3}, {"patch_size": 12}, {"stem_channels": 6}, {"max_prompt_bytes": 7}, {"bin_range": (1, 1)}]
)
def test_impossible_sizes_are_the_users_to_mend(changes):
    with pytest.raises(UserError, match=f"model.{next(iter(changes))}|model.width"):
        make_policy(**changes)
