"""Published files of pi0 and pi0.5, in each of their layouts, fill the policies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opentau_train.checkpoints.weights import load_pretrained, plan_weights
from opentau_train.errors import UserError
from opentau_train.models.pi import lerobot
from opentau_train.models.policy import build_policy
from tests.golden import pi
from tests.unit.models.pi_cases import (
    SPEC,
    TOKENS,
    golden_batch,
    golden_pi,
    lerobot_name,
    library_pi0,
    make_pi0,
    make_pi05,
    published,
)

pytestmark = pytest.mark.slow  # transformers takes 5 s to import


def save(path, weights):
    save_file({name: value.clone() for name, value in weights.items()}, path)
    return path


@pytest.mark.parametrize("make", [make_pi0, make_pi05], ids=["pi0", "pi05"])
@pytest.mark.parametrize("layout", ["transformers", "lerobot", "openpi"])
def test_every_layout_fills_the_whole_policy(make, layout, tmp_path):
    source, policy = make(seed=1), make(seed=2)
    report = load_pretrained(policy, save(tmp_path / "a.safetensors", published(source, layout)), policy.weight_map())
    assert not report.missing and not report.unexpected and not report.mismatched
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in policy.state_dict().items())


def test_the_new_heads_of_action_tokens_keep_their_initialisation(tmp_path):
    policy = make_pi0(**TOKENS)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    file = save(tmp_path / "a.safetensors", published(make_pi0(seed=1), "lerobot"))
    report = load_pretrained(policy, file, policy.weight_map())
    assert set(report.missing) == {"action_token_embed.weight", "action_token_out.weight"}
    assert all(torch.equal(policy.state_dict()[name], before[name]) for name in report.missing)


@pytest.mark.parametrize("layout", ["paligemma", "older paligemma"])
def test_the_language_models_own_file_fills_its_part_alone(layout, tmp_path):
    source, policy = make_pi05(seed=1), make_pi05(seed=2)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    file = save(tmp_path / "a.safetensors", published(source, layout))
    report = load_pretrained(policy, file, policy.vlm_weight_map())
    assert not report.missing and not report.unexpected
    for name, value in policy.state_dict().items():
        filled = ".vlm." in name or name.startswith(("vision.", "token_embed.", "vlm_norm."))
        assert torch.equal(value, source.state_dict()[name] if filled else before[name]), name


def test_what_transformers_itself_saves_is_read(tmp_path):
    library, policy = library_pi0(), make_pi0()
    library.save_pretrained(tmp_path)
    report = load_pretrained(policy, tmp_path, policy.weight_map())
    assert not report.missing and not report.unexpected
    assert torch.equal(policy.action_out_proj.weight, library.action_out_proj.weight)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_all_of_lerobots_own_names_and_shapes_are_known(kind, tmp_path):
    """The tensors of LeRobot's own model, by name and shape, and its numbers from them."""
    want = json.loads(pi.FILE.read_text())[kind]
    tensors = {f"model.{name}": pi.weight(name, tuple(shape)) for name, shape in want["shapes"].items()}
    policy = golden_pi(kind)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    report = load_pretrained(policy, save(tmp_path / "model.safetensors", tensors), policy.weight_map())
    assert not report.missing and not report.unexpected
    batch, draws = golden_batch(policy)
    torch.testing.assert_close(policy.sample_actions(batch, draws), torch.tensor(want["chunk"]), rtol=0, atol=3e-5)


def test_weights_of_another_policy_are_refused_and_other_dimensions_by_choice(tmp_path):
    policy = make_pi05()
    file = save(tmp_path / "a.safetensors", published(make_pi0(), "lerobot"))
    with pytest.raises(UserError, match="1 tensors of the file have other shapes"):
        load_pretrained(policy, file, policy.weight_map())
    wide = make_pi0(max_state_dim=12, max_action_dim=10)
    with pytest.raises(UserError, match=r"4 tensors of the file have other shapes") as refused:
        plan_weights(wide, file, wide.weight_map(), resize=False)
    assert "model.resize_dims=true" in refused.value.remedy
    load_pretrained(wide, file, wide.weight_map())
    assert torch.equal(wide.state_proj.weight[:, :8], make_pi0().state_proj.weight)
    assert not wide.state_proj.weight[:, 8:].any() and not wide.action_out_proj.bias[8:].any()


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_what_is_exported_for_lerobot_has_the_names_and_shapes_of_its_own_model(kind):
    policy = golden_pi(kind)
    want = json.loads(pi.FILE.read_text())[kind]["shapes"]
    named = lerobot.weights(policy)
    assert {name: list(value.shape) for name, value in named.items()} == want
    assert all(torch.equal(named[lerobot_name(name)], value) for name, value in policy.state_dict().items())
    with pytest.raises(UserError, match=f"LeRobot's {kind} has the published sizes only"):
        policy.lerobot_export()


def test_the_published_sizes_are_exported_with_lerobots_settings():
    import yaml

    tree = {
        **yaml.safe_load(Path("conf/model/pi0.yaml").read_text()),
        "_target_": "opentau_train.models.pi.pi05.Pi05Policy",
    }
    spec = dataclasses.replace(SPEC, image_size=(224, 224), chunk_length=50)
    with torch.device("meta"):
        policy = build_policy(tree, spec)
        made = policy.lerobot_export()
        for lacking in ({"cameras": ()}, {"state_dim": 0}):
            with pytest.raises(UserError, match="LeRobot's pi05 needs a camera and a state"):
                build_policy(tree, dataclasses.replace(spec, **lacking)).lerobot_export()
    assert round(sum(p.numel() for p in policy.parameters()) / 1e9, 1) == 3.4
    assert made.config["type"] == "pi05" and made.config["chunk_size"] == 50
    assert [name for name, _ in made.steps][2:5] == [
        "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
    ]
    shapes = {name: tuple(value.shape) for name, value in made.weights.items()}
    assert shapes["model.paligemma_with_expert.gemma_expert.lm_head.weight"] == (257152, 1024)
