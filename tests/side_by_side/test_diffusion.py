"""Diffusion Policy beside LeRobot's own class: the same weights, batches and noise give the same predictions, losses,
chunks and trained weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.checkpoints.weights import fill, load_pretrained, plan_weights
from opentau_train.errors import UserError
from opentau_train.models.diffusion import DiffusionPolicy
from opentau_train.models.draws import Draws
from opentau_train.tools import export
from opentau_train.types import BatchSpec
from tests.program import DATA, train_here
from tests.side_by_side.test_act import assert_exported_predicts_the_same, of_lerobot, whole_batch
from tests.unit.models.flow_cases import total
from tests.unit.models.test_diffusion import make_diffusion

pytestmark = pytest.mark.lerobot

SPEC = BatchSpec(cameras=("wrist", "left"), image_size=(64, 96), history=0, state_dim=5, action_dim=4, chunk_length=8)
SIZES = {"down_dims": (32, 64, 96), "groups": 4, "step_dim": 16, "kernel_size": 3}
VARIANTS = {
    "published": {},
    "encoders, ddim, sample, shift": {
        "shared_encoder": False,
        "film_scale": False,
        "sampler": "ddim",
        "inference_steps": 10,
        "predicts": "sample",
    },
    "linear": {"beta_schedule": "linear", "inference_steps": 25, "clip_range": None, "down_dims": (64,)},
}


def make(lerobot_diffusion, spec: BatchSpec = SPEC, **changes) -> tuple[DiffusionPolicy, torch.nn.Module]:
    """(ours, LeRobot's) with the same weights."""
    policy = make_diffusion(spec, **{**SIZES, **changes})
    exported = policy.lerobot_export()
    kinds, feature = lerobot_diffusion.types.FeatureType, lerobot_diffusion.types.PolicyFeature
    cameras = {f"observation.images.{c}": feature(kinds.VISUAL, (3, *spec.image_size)) for c in spec.cameras}
    config = lerobot_diffusion.Config(
        input_features={**cameras, "observation.state": feature(kinds.STATE, (spec.state_dim,))},
        output_features={"action": feature(kinds.ACTION, (spec.action_dim,))},
        do_mask_loss_for_padding=True,
        device="cpu",
        **{key: value for key, value in exported.config.items() if key != "type"},
    )
    reference = lerobot_diffusion.Policy(config)
    reference.load_state_dict(exported.weights)  # strict: all names are LeRobot's
    return policy, reference


@pytest.fixture(params=VARIANTS)
def policies(request, lerobot_diffusion) -> tuple[DiffusionPolicy, torch.nn.Module]:
    return make(lerobot_diffusion, **VARIANTS[request.param])


@pytest.fixture
def drawn(monkeypatch):
    """Lets LeRobot draw our noise and diffusion steps of the batch that is given."""

    def draws_of(batch, num_steps: int) -> Draws:
        draws = Draws(batch.key)
        monkeypatch.setattr(torch, "randn", lambda shape, device: draws.normal("actions", shape[1:]))
        monkeypatch.setattr(torch, "randint", lambda low, high, size, device: draws.choice("step", num_steps))
        return draws

    return draws_of


def losses(policies, batch, drawn) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, and LeRobot's over the valid elements alone, by which its mean isn't divided."""
    policy, reference = policies
    terms = policy.train()(batch, drawn(batch, policy.noise.train_steps))
    theirs = reference.train()({**of_lerobot(batch), "observation.state": batch.state[:, None]})[0]
    return total(policy, terms), theirs * batch.actions.numel() / terms["mse"][1].sum()


def test_predictions_are_lerobots(policies):
    policy, reference = policies
    batch = whole_batch(3, 1, SPEC)
    given = of_lerobot(batch)
    pictures = torch.stack([given[f"observation.images.{c}"] for c in policy.spec.cameras], dim=1)
    seen = {"observation.state": batch.state[:, None], "observation.images": pictures[:, None]}
    condition = policy._condition(batch)
    theirs = reference.diffusion._prepare_global_conditioning(seen)
    torch.testing.assert_close(condition, theirs, rtol=0, atol=1e-5)
    step = torch.tensor([0, 41, 99])
    ours = policy.unet(batch.actions, step, condition)
    torch.testing.assert_close(ours, reference.diffusion.unet(batch.actions, step, theirs), rtol=0, atol=1e-5)
    assert ours.std() > 0.1


@pytest.mark.parametrize("num_padded", [0, 5])
def test_losses_are_lerobots(policies, drawn, num_padded):
    """Padded steps repeat the last one, as LeRobot's datasets have it, whatever stands there."""
    policy, reference = policies
    batch = whole_batch(3, 2, SPEC)
    if num_padded:
        batch.action_is_pad[1, -num_padded:] = True
        batch.actions[1, -num_padded:] = batch.actions[1, -num_padded - 1]
    ours, theirs = losses(policies, batch, drawn)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    batch.actions[1, 8 - num_padded :] = float("nan") if num_padded else batch.actions[1, 8:]
    assert losses((policy, reference), batch, drawn)[0].item() == pytest.approx(theirs.item(), rel=1e-5)


def test_sampled_chunks_are_lerobots(lerobot_diffusion, policies, monkeypatch):
    """From the same noise, in each step too."""
    policy, reference = policies
    batch = whole_batch(3, 3, SPEC)
    draws, steps = Draws(batch.key), iter(policy.noise.scheduler().timesteps.tolist())
    shape = policy.spec.chunk_length, policy.spec.action_dim
    monkeypatch.setattr(
        lerobot_diffusion.ddpm, "randn_tensor", lambda *args, **kwargs: draws.normal(f"step {next(steps)}", shape)
    )
    with torch.no_grad():
        theirs = reference.diffusion.conditional_sample(
            3, policy._condition(batch), noise=draws.normal("actions", shape)
        )
    ours = policy.eval().sample_actions(batch, draws)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.std() > 0.1


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.nightly)])
def test_as_many_steps_lead_to_lerobots_weights(steps, lerobot_diffusion, drawn):
    """With its own optimizer. What Adam makes of gradients of about 0, as many of the ResNet's are, is chance."""
    policies = make(lerobot_diffusion)
    optimizers = [torch.optim.Adam(p.parameters(), 1e-4, (0.95, 0.999), 1e-8, 1e-6) for p in policies]
    begun = {name: value.clone() for name, value in policies[0].lerobot_export().weights.items()}
    for batch in [whole_batch(2, step, SPEC) for step in range(steps)]:
        both = losses(policies, batch, drawn)
        assert both[0].item() == pytest.approx(both[1].item(), rel=1e-4)
        for loss, optimizer in zip(both, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ours, trained = policies[0].lerobot_export().weights, policies[1].state_dict()
    apart = {name: (value - trained[name]).abs() for name, value in ours.items()}
    assert max(values.max().item() for name, values in apart.items() if "unet" in name) < 1e-4
    moved = sum((trained[name] - value).abs().sum().item() for name, value in begun.items())
    assert sum(values.sum().item() for values in apart.values()) < 0.01 * moved


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our policy of a short run, the folder that it was exported to)."""
    folder = tmp_path_factory.mktemp("diffusion")
    words = ["+recipe=lerobot", "model=diffusion_tiny", "data.normalization=min_max", "model.noise.clip_range=1.0"]
    words += [
        f"data.sources.main.root={DATA / 'lerobot_v30'}",
        "data.image_size=[48,64]",
        "data.chunk_length=8",
        "data.num_workers=0",
        "trainer.steps=3",
    ]
    run = train_here([*words, "trainer.global_batch_size=4", "validation.every=0", "logger=none"], folder / "run")
    assert export.main([f"checkpoint={run}", "format=lerobot", f"out={folder / 'out'}"]) == 0
    return load_policy(run), folder / "out"


def test_an_exported_folder_is_loaded_by_lerobot_and_predicts_the_same_chunks(lerobot_diffusion, exported):
    """Asked for an action at a time, as a robot does."""
    loaded, folder = exported
    policy = lerobot_diffusion.Policy.from_pretrained(folder, strict=True)

    def predict(seen, batch):
        policy.reset()
        noise = Draws(batch.key).normal("actions", (8, loaded.spec.action_dim))
        return torch.stack([policy.select_action(seen, noise=noise) for _ in range(8)], dim=1)

    assert_exported_predicts_the_same(loaded, folder, predict)


def test_a_folder_that_lerobot_saved_is_where_a_run_begins(lerobot_diffusion, policies, tmp_path):
    """With its statistics, which are reported and not used; of two observation steps it is told of and refused."""
    from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors

    policy, reference = policies
    stats = {"action": {"min": torch.zeros(4), "max": torch.ones(4)}}
    reference.save_pretrained(tmp_path / "one")
    for processor in make_diffusion_pre_post_processors(reference.config, stats):
        processor.save_pretrained(tmp_path / "one")
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    for value in policy.state_dict().values():
        value.zero_()
    plan = plan_weights(policy, tmp_path / "one", policy.weight_map())
    fill(policy, plan)
    assert not (plan.report.missing or plan.report.unexpected) and "action.max [4]" in str(plan)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    reference.config.n_obs_steps = 2
    lerobot_diffusion.Policy(reference.config).save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="have other shapes") as caught:
        load_pretrained(policy, tmp_path / "two", policy.weight_map())
    assert "n_obs_steps=1" in caught.value.remedy


@pytest.fixture(scope="session")
def lerobot_diffusion(lerobot) -> SimpleNamespace:
    from diffusers.schedulers import scheduling_ddpm
    from lerobot.configs import types
    from lerobot.policies.diffusion import configuration_diffusion, modeling_diffusion

    return SimpleNamespace(
        Config=configuration_diffusion.DiffusionConfig,
        Policy=modeling_diffusion.DiffusionPolicy,
        ddpm=scheduling_ddpm,
        types=types,
    )
