"""ACT beside LeRobot's own class: the same weights and batches give the same chunks, losses and trained weights.

The backbone there is torchvision's ResNet-18. LeRobot's loss averages padding too, so that batches have none.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opentau_train.checkpoints.pretrained import Loaded, load_policy
from opentau_train.checkpoints.weights import fill, load_pretrained, plan_weights
from opentau_train.models.act import ActPolicy, TemporalEnsemble
from opentau_train.models.draws import Draws
from opentau_train.models.resnet import MEAN, STD
from opentau_train.tools import export
from opentau_train.types import BatchSpec
from tests.program import DATA, train_here
from tests.unit.models.flow_cases import make_batch, total

pytestmark = pytest.mark.lerobot

SPEC = BatchSpec(cameras=("wrist", "left"), image_size=(64, 96), history=0, state_dim=5, action_dim=4, chunk_length=6)


def whole_batch(num: int, seed: int, spec: BatchSpec = SPEC):
    """A batch in which nothing is missing and no step padded."""
    g = torch.Generator().manual_seed(seed)
    return make_batch(
        spec,
        num,
        seed,
        camera_mask={camera: torch.ones(num, dtype=torch.bool) for camera in spec.cameras},
        state=torch.randn(num, spec.state_dim, generator=g),
        state_dim_mask=torch.ones(num, spec.state_dim, dtype=torch.bool),
        actions=torch.randn(num, spec.chunk_length, spec.action_dim, generator=g),
        action_is_pad=torch.zeros(num, spec.chunk_length, dtype=torch.bool),
        action_dim_mask=torch.ones(num, spec.action_dim, dtype=torch.bool),
    )


def of_lerobot(batch) -> dict[str, torch.Tensor]:
    """The same batch as LeRobot has it after its own normalisation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pictures = {f"observation.images.{c}": (frames[:, -1] / 255 - mean) / std for c, frames in batch.images.items()}
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


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.nightly)])
def test_as_many_steps_lead_to_lerobots_weights(steps, policies, latent):
    """With its own optimizer. What AdamW makes of gradients of about 0 is chance (keys' biases, which attention can't
    see)."""
    policy, reference = policies
    optimizers = [torch.optim.AdamW(p.parameters(), lr=1e-5, weight_decay=1e-4) for p in (policy, reference.model)]
    begun = {name: value.clone() for name, value in policy.named_parameters()}
    for step in range(steps):
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our policy of a short run, the folder that it was exported to)."""
    folder = tmp_path_factory.mktemp("act")
    sizes = ["model.width=64", "model.heads=4", "model.feedforward=96", "model.backbone_norm=frozen_batch"]
    words = ["+recipe=lerobot", "model=act_tiny", *sizes, f"data.sources.main.root={DATA / 'lerobot_v30'}"]
    words += ["data.image_size=[48,64]", "data.num_workers=0", "trainer.steps=3", "trainer.global_batch_size=4"]
    run = train_here([*words, "validation.every=0", "logger=none"], folder / "run")
    assert export.main([f"checkpoint={run}", "format=lerobot", f"out={folder / 'out'}"]) == 0
    return load_policy(run), folder / "out"


def test_an_exported_folder_is_loaded_by_lerobot_and_predicts_the_same_chunks(lerobot_act, exported):
    loaded, folder = exported
    policy = lerobot_act.Policy.from_pretrained(folder, strict=True)
    assert_exported_predicts_the_same(loaded, folder, lambda seen, batch: policy.predict_action_chunk(seen))


def assert_exported_predicts_the_same(loaded: Loaded, folder: Path, predict) -> None:
    """Through LeRobot's own processors: from pictures and a state in the robot's units to actions in them. `predict`
    makes LeRobot's chunk [B, T, A] of what its preprocessor made; our batch tells it of keys."""
    from lerobot.processor import PolicyProcessorPipeline, converters

    g = np.random.default_rng(0)
    (norm_head,) = loaded.pipelines
    state, size = loaded.stats[norm_head].state, (*loaded.spec.image_size, 3)
    seen = [
        {
            "images": {c: g.integers(0, 256, size, np.uint8) for c in loaded.spec.cameras},
            "state": (state.mean + state.std * g.normal(size=len(state.mean))).astype(np.float32),
        }
        for _ in range(3)
    ]
    batch = loaded.observe(seen, norm_head)
    chunk = loaded.policy.sample_actions(batch, Draws(batch.key))
    before = PolicyProcessorPipeline.from_pretrained(folder, config_filename="policy_preprocessor.json")
    after = PolicyProcessorPipeline.from_pretrained(
        folder,
        config_filename="policy_postprocessor.json",
        to_transition=converters.policy_action_to_transition,
        to_output=converters.transition_to_policy_action,
    )
    theirs = {
        f"observation.images.{c}": torch.stack([torch.from_numpy(o["images"][c]).permute(2, 0, 1) / 255 for o in seen])
        for c in loaded.spec.cameras
    }
    theirs["observation.state"] = torch.stack([torch.from_numpy(o["state"]) for o in seen])
    predicted = predict(before(theirs), batch)
    torch.testing.assert_close(chunk, predicted, rtol=0, atol=1e-5)
    units = loaded.units(chunk, batch)
    np.testing.assert_allclose(after(predicted).numpy(), units, rtol=1e-5, atol=1e-5 * np.abs(units).max())
    assert chunk.std() > 0.01


def test_a_folder_that_lerobot_saved_is_where_a_run_begins(lerobot_act, policies, tmp_path):
    """With its statistics, which are reported and not used."""
    from lerobot.policies.act.processor_act import make_act_pre_post_processors

    policy, reference = policies
    stats = {"action": {"mean": torch.ones(4), "std": torch.ones(4)}}
    reference.save_pretrained(tmp_path / "act")
    for processor in make_act_pre_post_processors(reference.config, stats):
        processor.save_pretrained(tmp_path / "act")
    with torch.no_grad():
        for value in policy.state_dict().values():
            value.zero_()
    plan = plan_weights(policy, tmp_path / "act", policy.weight_map())
    fill(policy, plan)
    assert not (plan.report.missing or plan.report.unexpected) and "action.mean [4]" in str(plan)
    assert torch.equal(plan.stats["action.mean"], torch.ones(4))
    test_chunks_are_lerobots((policy, reference))


def test_the_file_of_torchvisions_resnet_is_a_backbone(lerobot_act, policies, tmp_path):
    from torchvision.models import resnet18

    policy, _ = policies
    torch.manual_seed(1)
    published = resnet18(weights=None).eval()
    for name, buffer in published.named_buffers():
        if not name.endswith("num_batches_tracked"):
            buffer.add_(0.2 * torch.rand_like(buffer))
    save_file(published.state_dict(), tmp_path / "resnet18.safetensors")
    before = policy.action_head.weight.clone()
    report = load_pretrained(policy, tmp_path / "resnet18.safetensors", policy.backbone_weight_map())
    assert len(report.loaded) == 100 and not (report.missing or report.unexpected)
    frames = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    x = published.maxpool(published.relu(published.bn1(published.conv1((frames / 255 - mean) / std))))
    x = published.layer4(published.layer3(published.layer2(published.layer1(x))))
    torch.testing.assert_close(policy.backbone(frames), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(policy.action_head.weight, before)


@pytest.fixture(scope="session")
def lerobot_act(lerobot) -> SimpleNamespace:
    from lerobot.configs import types
    from lerobot.policies.act import configuration_act, modeling_act

    return SimpleNamespace(
        Config=configuration_act.ACTConfig, Policy=modeling_act.ACTPolicy, module=modeling_act, types=types
    )
