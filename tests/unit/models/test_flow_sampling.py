"""Sampling, learning, compiling: what the loss alone doesn't show."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opentau_train import cli
from opentau_train.config.typed import instantiate
from opentau_train.models.flow import FlowPolicy
from tests.unit.models.flow_cases import SPEC, Noise, make_batch, make_noise, make_policy, total


@pytest.mark.slow
def test_overfitted_policy_samples_its_actions_from_any_noise():
    spec = dataclasses.replace(SPEC, cameras=("wrist",), history=0)
    policy = make_policy(spec)
    batch = make_batch(spec, seed=3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    draws = torch.Generator().manual_seed(0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 400)
        noise = Noise(torch.randn(batch.actions.shape, generator=draws), torch.rand(len(batch), generator=draws))
        optimizer.zero_grad()
        total(policy, policy(batch, noise)).backward()
        optimizer.step()
    real = ~batch.action_is_pad[:, :, None] & batch.action_dim_mask[:, None, :]
    for seed in (11, 12):
        error = (policy.sample_actions(batch, make_noise(batch, seed)) - batch.actions)[real].square().mean()
        assert error < 0.05 * batch.actions[real].square().mean()


def test_sampling_equals_euler_steps_over_the_training_forward(policy):
    """The cached prefix gives what the whole sequence gives: velocities read off the training pass, by hand."""
    batch = make_batch(action_is_pad=torch.zeros(4, 6, dtype=torch.bool))
    draws = make_noise(batch)
    start = draws.noise
    dims = batch.action_dim_mask[:, None, :].float()
    velocity = []
    handle = policy.velocity_out.register_forward_hook(lambda _m, _i, out: velocity.append(out))
    x = start * dims
    with torch.no_grad():
        for step in range(10):
            # With time 1 - step/10 and actions x solved from x_t = t * 0 + (1 - t) * actions, the network sees x.
            time = torch.full((4,), 1.0 - step / 10)
            noise = Noise(x / time[:, None, None], time)
            policy(batch.replace(actions=torch.zeros_like(x)), noise)
            x = x - velocity[-1] * dims / 10
    handle.remove()
    torch.testing.assert_close(policy.sample_actions(batch, draws), x, atol=1e-4, rtol=1e-4)


def test_sampling_reads_no_action_of_the_batch(policy):
    batch = make_batch()
    noise = make_noise(batch)
    blind = batch.replace(
        actions=torch.full_like(batch.actions, float("nan")),
        action_is_pad=torch.ones_like(batch.action_is_pad),
    )
    sampled = policy.sample_actions(batch, noise)
    assert torch.equal(sampled, policy.sample_actions(blind, noise))
    assert sampled.dtype == torch.float32 and not sampled.requires_grad
    assert not sampled.masked_select(~batch.action_dim_mask[:, None, :].expand_as(sampled)).any()


def test_prompts_are_cut_in_bytes_and_filled_with_the_pad_symbol(policy):
    tokens = make_batch(num=3, prompt=["é" * 40, "ab", ""]).prompt_tokens
    assert tokens.shape == (3, policy.max_prompt_bytes) and tokens.dtype == torch.int64
    assert bytes(tokens[0].tolist()).decode() == "é" * 16
    assert tokens[1].tolist() == [97, 98] + [256] * 30 and (tokens[2] == 256).all()


@pytest.mark.slow
def test_compiled_forward_gives_the_same_losses_for_new_prompts_without_recompiling(policy):
    """Traced, not lowered: code generation is the compiler's own affair and takes a minute."""
    torch._dynamo.reset()
    compiled = torch.compile(policy, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    for seed in range(3):
        prompts = [f"task {seed} {i}" * (seed + 1) for i in range(4)]
        modes = [["policy", "inverse_dynamics", "forward_dynamics"][(i + seed) % 3] for i in range(4)]
        batch = make_batch(seed=seed, prompt=prompts, mode=modes)
        noise = make_noise(batch, seed)
        for term, (sums, counts) in compiled(batch, noise).items():
            want = policy(batch, noise)[term]
            torch.testing.assert_close(sums, want[0], atol=1e-4, rtol=1e-4)
            assert torch.equal(counts, want[1])
        if seed == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs


def test_blocks_are_the_repeated_layers_in_order(policy):
    assert [id(b) for b in policy.blocks()] == [id(layer) for layer in policy.layers] and len(policy.blocks()) == 2


@pytest.mark.parametrize(("size", "millions"), [("tiny", (1, 3)), ("small", (25, 35)), ("base", (105, 135))])
def test_preset_builds_its_size(size, millions):
    tree = cli.compose(["+recipe=droid_policy", f"model=flow_{size}"])["model"]
    spec = dataclasses.replace(SPEC, cameras=("a", "b", "c"), image_size=(96, 96), action_dim=8, chunk_length=16)
    with torch.device("meta"):
        policy = instantiate(tree, "model", spec=spec)
    assert isinstance(policy, FlowPolicy)
    assert millions[0] <= sum(p.numel() for p in policy.parameters()) / 1e6 <= millions[1]
