"""ACT beside LeRobot's own class: the same weights and batches give the same chunks, losses and trained weights.

The backbone there is torchvision's ResNet-18. LeRobot's loss averages padding too, so that batches have none.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opentau_train.models.act import ActPolicy, TemporalEnsemble
from opentau_train.models.draws import Draws
from opentau_train.models.resnet import MEAN, STD
from opentau_train.types import BatchSpec
from tests.unit.models.flow_cases import make_batch, total

pytestmark = pytest.mark.lerobot

SPEC = BatchSpec(cameras=("wrist", "left"), image_size=(64, 96), history=0, state_dim=5, action_dim=4, chunk_length=6)


def whole_batch(num: int, seed: int):
    """A batch in which nothing is missing and no step padded."""
    g = torch.Generator().manual_seed(seed)
    return make_batch(
        SPEC,
        num,
        seed,
        camera_mask={camera: torch.ones(num, dtype=torch.bool) for camera in SPEC.cameras},
        state=torch.randn(num, SPEC.state_dim, generator=g),
        state_dim_mask=torch.ones(num, SPEC.state_dim, dtype=torch.bool),
        actions=torch.randn(num, SPEC.chunk_length, SPEC.action_dim, generator=g),
        action_is_pad=torch.zeros(num, SPEC.chunk_length, dtype=torch.bool),
        action_dim_mask=torch.ones(num, SPEC.action_dim, dtype=torch.bool),
    )


def of_lerobot(batch) -> dict[str, torch.Tensor]:
    """The same batch as LeRobot has it after its own normalisation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pictures = {f"observation.images.{c}": (batch.images[c][:, -1] / 255 - mean) / std for c in SPEC.cameras}
    rows = {"observation.state": batch.state, "action": batch.actions, "action_is_pad": batch.action_is_pad}
    return {**pictures, **rows}


@pytest.fixture
def policies(lerobot_act) -> tuple[ActPolicy, torch.nn.Module]:
    """(ours, LeRobot's) with the same weights, and a backbone whose fixed statistics do something."""
    torch.manual_seed(0)
    kinds, feature = lerobot_act.types.FeatureType, lerobot_act.types.PolicyFeature
    cameras = {f"observation.images.{c}": feature(kinds.VISUAL, (3, *SPEC.image_size)) for c in SPEC.cameras}
    config = lerobot_act.Config(
        input_features={**cameras, "observation.state": feature(kinds.STATE, (SPEC.state_dim,))},
        output_features={"action": feature(kinds.ACTION, (SPEC.action_dim,))},
        pretrained_backbone_weights=None,
        chunk_size=SPEC.chunk_length,
        n_action_steps=SPEC.chunk_length,
        dim_model=64,
        n_heads=4,
        dim_feedforward=96,
        n_encoder_layers=2,
        n_decoder_layers=2,
        n_vae_encoder_layers=2,
        latent_dim=8,
        dropout=0.0,
        device="cpu",
    )
    reference = lerobot_act.Policy(config)
    for name, buffer in reference.named_buffers():
        if name.endswith(("running_mean", "running_var", "bias", "weight")):
            buffer.add_(0.2 * torch.rand_like(buffer))
    depths = {"vae_depth": 2, "encoder_depth": 2, "decoder_depth": 2}
    sizes = {"width": 64, "heads": 4, "feedforward": 96, "latent_dim": 8, "dropout": 0.0}
    policy = ActPolicy(SPEC, **sizes, **depths, backbone_norm="frozen_batch")
    policy.load_state_dict(reference.model.state_dict())  # strict: all names are LeRobot's
    return policy, reference


@pytest.fixture
def latent(lerobot_act, monkeypatch):
    """Lets LeRobot draw our noise of the batch that is given."""

    def draws_of(batch) -> Draws:
        draws = Draws(batch.key)
        monkeypatch.setattr(lerobot_act.module.torch, "randn_like", lambda mean: draws.normal("latent", mean.shape[1:]))
        return draws

    return draws_of


def test_chunks_are_lerobots(policies):
    policy, reference = policies
    batch = whole_batch(3, seed=1)
    chunk = policy.eval().sample_actions(batch, Draws(batch.key))
    given = {name: value for name, value in of_lerobot(batch).items() if not name.startswith("action")}
    torch.testing.assert_close(chunk, reference.predict_action_chunk(given), rtol=0, atol=1e-5)
    assert chunk.std() > 0.1


def test_losses_are_lerobots(policies, latent):
    policy, reference = policies
    batch = whole_batch(3, seed=2)
    terms = policy.train()(batch, latent(batch))
    loss, named = reference.train()(of_lerobot(batch))
    means = {term: (s.sum() / c.sum()).item() for term, (s, c) in terms.items()}
    assert means["l1"] == pytest.approx(named["l1_loss"], rel=1e-5)
    assert means["kl"] == pytest.approx(named["kld_loss"], rel=1e-5) and means["kl"] > 1e-3
    assert total(policy, terms).item() == pytest.approx(loss.item(), rel=1e-5)


def test_twenty_steps_lead_to_lerobots_weights(policies, latent):
    """With its own optimizer. What AdamW makes of gradients of about 0 is chance (keys' biases, which attention can't
    see)."""
    policy, reference = policies
    optimizers = [torch.optim.AdamW(p.parameters(), lr=1e-5, weight_decay=1e-4) for p in (policy, reference.model)]
    begun = {name: value.clone() for name, value in policy.named_parameters()}
    for step in range(20):
        batch = whole_batch(2, seed=step)
        losses = [total(policy, policy.train()(batch, latent(batch))), reference.train()(of_lerobot(batch))[0]]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trained = dict(reference.model.named_parameters())
    apart = {name: (value - trained[name]).abs() for name, value in policy.named_parameters()}
    assert max(values.max().item() for values in apart.values()) < 1e-4
    moved = sum((trained[name] - value).abs().sum().item() for name, value in begun.items())
    assert sum(values.sum().item() for values in apart.values()) < 0.01 * moved


@pytest.mark.parametrize("coefficient", [0.01, 0.0, -0.3])
def test_the_ensemble_is_lerobots(lerobot_act, coefficient):
    ensemble, reference = TemporalEnsemble(coefficient), lerobot_act.module.ACTTemporalEnsembler(coefficient, 5)
    for episode in range(2):
        ensemble.reset(), reference.reset()
        for step in range(12):
            chunk = torch.from_numpy(np.random.default_rng([episode, step]).normal(size=(2, 5, 3)).astype(np.float32))
            torch.testing.assert_close(ensemble.update(chunk), reference.update(chunk), rtol=0, atol=1e-6)


@pytest.fixture(scope="session")
def lerobot_act(lerobot) -> SimpleNamespace:
    from lerobot.configs import types
    from lerobot.policies.act import configuration_act, modeling_act

    return SimpleNamespace(
        Config=configuration_act.ACTConfig, Policy=modeling_act.ACTPolicy, module=modeling_act, types=types
    )
