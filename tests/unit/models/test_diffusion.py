"""The diffusion policy keeps the contract of a policy; its numbers beside LeRobot's: tests/side_by_side."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.distributed.parallel import compiled
from opentau_train.errors import UserError
from opentau_train.models.diffusion import DiffusionPolicy, NoiseSchedule
from opentau_train.models.draws import Draws
from opentau_train.models.policy import check_model
from opentau_train.models.unet import UnetSizes
from tests.nightly import at_night
from tests.program import DATA, metrics, train_here
from tests.unit.models import flow_cases
from tests.unit.models.flow_cases import make_batch, total, with_garbage

SPEC = dataclasses.replace(flow_cases.SPEC, chunk_length=8)
UNET = UnetSizes(down_dims=(16, 32), kernel_size=5, groups=8, step_dim=16, film_scale=True)
NOISE = NoiseSchedule("ddpm", 100, None, "squaredcos_cap_v2", 1e-4, 0.02, "epsilon", 1.0)


def make_diffusion(spec=SPEC, **changes) -> DiffusionPolicy:
    """`changes` are of the policy, its U-Net or its noise."""
    torch.manual_seed(0)
    parts = [
        dataclasses.replace(
            part, **{f.name: changes.pop(f.name) for f in dataclasses.fields(part) if f.name in changes}
        )
        for part in (UNET, NOISE)
    ]
    return DiffusionPolicy(spec, unet=parts[0], noise=parts[1], **{"num_keypoints": 4, **changes})


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    return make_diffusion()


def losses(policy: DiffusionPolicy, batch) -> tuple[torch.Tensor, torch.Tensor]:
    return policy(batch, Draws(batch.key))["mse"]


def chunk(policy: DiffusionPolicy, batch) -> torch.Tensor:
    return policy.sample_actions(batch, Draws(batch.key))


def test_the_term_sums_over_the_real_entries_and_counts_those_of_the_masks(policy):
    batch = make_batch(SPEC)
    sums, counts = losses(policy, batch)
    real = ~batch.action_is_pad[:, :, None] & batch.action_dim_mask[:, None, :]
    assert torch.equal(counts, real.sum((1, 2)).float()) and torch.equal(policy.term_counts(batch)["mse"], counts)
    assert (sums > 0).all()


@pytest.mark.parametrize("predicts", ["epsilon", "sample"])
def test_garbage_in_padded_entries_changes_nothing(predicts):
    policy, batch = make_diffusion(predicts=predicts, inference_steps=4), make_batch(SPEC)
    dirty = with_garbage(batch)
    torch.testing.assert_close(losses(policy, dirty), losses(policy, batch), rtol=1e-6, atol=1e-6)
    assert torch.equal(chunk(policy, dirty), chunk(policy, batch))
    assert not chunk(policy, batch)[2, :, -1].any(), "a dimension that the sample lacks"


def test_a_padded_step_looks_like_the_last_one_that_is_not(policy):
    batch = make_batch(SPEC)
    whole = batch.replace(action_is_pad=torch.zeros_like(batch.action_is_pad), actions=batch.actions.clone())
    whole.actions[2, 4:] = batch.actions[2, 3]
    seen = []
    hook = policy.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    losses(policy, batch), losses(policy, whole)
    hook.remove()
    assert torch.equal(*seen)


def test_a_sample_loses_and_is_given_the_same_alone_and_in_any_batch():
    policy, batch = make_diffusion(inference_steps=4), make_batch(SPEC, num=5)
    together, chunks = losses(policy, batch), chunk(policy, batch)
    for i, alone in enumerate(batch.split(1)):
        torch.testing.assert_close(losses(policy, alone), tuple(t[i : i + 1] for t in together), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chunk(policy, alone), chunks[i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"weight": torch.zeros(4)}, {"action_is_pad": torch.ones(4, 8, dtype=torch.bool)}])
def test_what_is_not_supervised_is_exactly_zero_and_gives_no_gradient(changes):
    policy, batch = make_diffusion(), make_batch(SPEC, **changes)
    terms = policy(batch, Draws(batch.key))
    assert not any(sums.any() or counts.any() for sums, counts in terms.values())
    total(policy, terms).backward()
    assert not any(parameter.grad.any() for parameter in policy.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lacks", "shared_encoder"),
    [({}, True), ({}, False), ({"cameras": ("left",)}, False), ({"cameras": ()}, True), ({"state_dim": 0}, True)],
    ids=str,
)
def test_every_parameter_gets_a_finite_gradient_and_every_input_matters(lacks, shared_encoder):
    spec = dataclasses.replace(SPEC, image_size=(32, 64), **lacks)
    policy, batch = make_diffusion(spec, shared_encoder=shared_encoder, inference_steps=4), make_batch(spec)
    total(policy, policy(batch, Draws(batch.key))).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in policy.parameters())
    first = chunk(policy, batch)
    if spec.state_dim:
        assert (chunk(policy, batch.replace(state=batch.state + 1)) - first).abs().max() > 1e-5
    for camera in spec.cameras:
        dark = {**batch.images, camera: torch.zeros_like(batch.images[camera])}
        assert (chunk(policy, batch.replace(images=dark)) - first).abs().max() > 1e-6


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_is_the_samples_own_draw_and_leaves_torchs_generator_alone(sampler):
    policy, batch = make_diffusion(sampler=sampler, inference_steps=4), make_batch(SPEC)
    state = torch.get_rng_state()
    first = chunk(policy, batch)
    assert torch.equal(chunk(policy, batch), first) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(policy.sample_actions(batch, Draws(batch.key, index=1)), first)
    assert first.abs().max() <= 1.0, "clip_range"


@at_night
def test_all_blocks_are_compiled_and_train_alike(caplog):
    """Each has a shape of its own; torch gives up after 8 of a class, with a warning, if it is let."""

    def gradients(policy):
        total(policy, policy(batch, Draws(batch.key))).backward()
        return {name: parameter.grad for name, parameter in policy.named_parameters()}

    policy = make_diffusion(dataclasses.replace(SPEC, cameras=()), down_dims=(8, 16, 24), inference_steps=2)
    batch = make_batch(policy.spec)
    eager = copy.deepcopy(policy)
    for block in policy.blocks():
        block.forward = compiled(block.forward, "aot_eager")
    torch.testing.assert_close(gradients(policy), gradients(eager), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunk(policy, batch), chunk(eager, batch), rtol=0, atol=1e-5)
    assert not [record for record in caplog.records if "recompile_limit" in record.getMessage()]


@pytest.mark.slow
def test_it_learns_to_sample_what_it_has_seen():
    """Of two actions, the one that the state tells."""
    spec = dataclasses.replace(SPEC, cameras=(), state_dim=1, action_dim=1)
    policy = make_diffusion(spec, predicts="sample", inference_steps=5)
    sign, whole = torch.tensor([1.0, -1.0]).repeat(8)[:, None], torch.ones(16, 1, dtype=torch.bool)
    batch = make_batch(spec, 16, state=sign, state_dim_mask=whole, action_dim_mask=whole)
    batch = batch.replace(actions=0.5 * sign[:, None].expand(-1, 8, -1))
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for step in range(60):
        optimizer.zero_grad()
        total(policy, policy(batch, Draws(batch.key, index=step))).backward()
        optimizer.step()
    assert (chunk(policy, batch) - batch.actions).abs().max() < 0.2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["data.chunk_length=18"], r"chunks of 18 steps are no multiple of 4.*set data.chunk_length=16 or 20"),
        (["data.sources.main.chunk_length=2"], r"no multiple of 4.*set data.chunk_length=4"),
        (["model.noise.clip_range=1.0"], r"cut at 1.0 standard deviations.*clip_range=5.0"),
        (["model.noise.inference_steps=200"], r"are more than model.noise.train_steps=100.*inference_steps=null"),
        (["model.noise.beta_start=0.1"], "must rise between 0 and 1"),
        (["model.unet.down_dims=[12]"], "must be multiples of 8"),
        (["model.unet.down_dims=[]"], "one at least"),
        (["model.unet.step_dim=3"], "must be even"),
        (["model.unet.kernel_size=4"], "odd"),
    ],
)
def test_what_can_not_be_built_is_told_before_data_are_opened(words, text):
    with pytest.raises(UserError) as caught:
        settings = load_settings(cli.compose(["+recipe=lerobot", "model=diffusion_tiny", *words]))
        check_model(settings.model, settings.data)
    assert re.search(text, str(caught.value), re.DOTALL), caught.value


def test_a_policy_without_inputs_is_refused():
    with pytest.raises(UserError, match="needs a camera or a state"):
        make_diffusion(dataclasses.replace(SPEC, cameras=(), state_dim=0))


@pytest.mark.slow
def test_any_dataset_trains_it_by_one_word(tmp_path):
    words = [
        "+recipe=lerobot",
        f"data.sources.main.root={DATA / 'lerobot_v30'}",
        "model=diffusion_tiny",
        "+debug=smoke",
    ]
    small = ["data.image_size=[32,32]", "trainer.global_batch_size=4", "data.num_workers=0", "logger=none"]
    rows = metrics(train_here([*words, *small], tmp_path / "run"))
    last = rows[max(rows)]
    assert last["Training/MSE"] > 0 and last["Validation/main/default/MSE"] > 0, last
