"""pi0 and pi0.5 as LeRobot's classes have them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opentau_train.errors import UserError
from opentau_train.models.lerobot import NORMALIZER, STEPS, LerobotExport, Step, check_inputs
from opentau_train.models.pi.parts import MAX_PERIOD, MIN_PERIOD
from opentau_train.models.pi.sizes import ExpertSizes, GemmaSizes, VisionSizes

if TYPE_CHECKING:
    from opentau_train.models.pi.policy import PiPolicy

PUBLISHED = (
    GemmaSizes(width=2048, depth=18, mlp=16384, heads=8, kv_heads=1, head_dim=256, vocab_size=257152),
    ExpertSizes(width=1024, mlp=4096),
    VisionSizes(width=1152, depth=27, mlp=4304, heads=16, patch_size=14, image_size=224),
)
"""The only sizes that LeRobot's configuration can say."""
TOKENIZER = "google/paligemma-3b-pt-224"

_VLM, _EXPERT = "paligemma_with_expert.paligemma", "paligemma_with_expert.gemma_expert"
_RENAMES = (
    (r"^vision\.(embeddings\..*)", rf"{_VLM}.model.vision_tower.vision_model.\1"),
    (r"^vision\.(layers\..*)", rf"{_VLM}.model.vision_tower.vision_model.encoder.\1"),
    (r"^vision\.norm\.", f"{_VLM}.model.vision_tower.vision_model.post_layernorm."),
    (r"^vision\.projector\.", f"{_VLM}.model.multi_modal_projector.linear."),
    (r"^layers\.(\d+)\.vlm\.", rf"{_VLM}.model.language_model.layers.\1."),
    (r"^layers\.(\d+)\.expert\.", rf"{_EXPERT}.model.layers.\1."),
    (r"^vlm_norm\.", f"{_VLM}.model.language_model.norm."),
    (r"^token_embed\.", f"{_VLM}.model.language_model.embed_tokens."),
    (r"^expert_norm\.", f"{_EXPERT}.model.norm."),
)


def weights(policy: PiPolicy) -> dict[str, Tensor]:
    """{LeRobot's name: tensor} of all that its class has, below its `model.`. The heads that nothing uses are there as
    it expects them: the language model's, which is its table, and the expert's, of zeros. It has no action tokens."""
    named = {}
    for name, value in policy.state_dict().items():
        if name.startswith("action_token_"):
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    table = policy.token_embed.weight.detach()
    named[f"{_VLM}.lm_head.weight"] = table.clone()
    named[f"{_EXPERT}.lm_head.weight"] = torch.zeros(len(table), policy.sizes[1].width, dtype=table.dtype)
    return named


def export(policy: PiPolicy) -> LerobotExport:
    """Raises `UserError` for sizes that LeRobot's configuration can't say, and inputs that its class needs."""
    check_inputs(policy.form, policy.spec)
    if policy.sizes != PUBLISHED:
        raise UserError(
            f"LeRobot's {policy.form} has the published sizes only",
            where="model.vlm, model.expert, model.vision",
            remedy="set format=safetensors",
        )
    prompt = policy.prompt
    config: dict[str, Any] = {
        "type": policy.form,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "float32",
        "n_obs_steps": 1,
        "chunk_size": policy.spec.chunk_length,
        "n_action_steps": policy.spec.chunk_length,
        "max_state_dim": policy.max_state_dim,
        "max_action_dim": policy.max_action_dim,
        "num_inference_steps": policy.num_flow_steps,
        "min_period": MIN_PERIOD,
        "max_period": MAX_PERIOD,
        "image_resolution": [policy.image_size, policy.image_size],
        "tokenizer_max_length": prompt.num_tokens,
    }
    words = {"tokenizer_name": TOKENIZER, "max_length": prompt.num_tokens, "padding_side": "right"}
    tokenize: Step = ("tokenizer_processor", {**words, "padding": "max_length"})
    rename, batch, device, normalizer = STEPS
    assert normalizer[0] == NORMALIZER
    if policy.form == "pi0":
        steps: tuple[Step, ...] = (rename, batch, ("pi0_new_line_processor", {}), tokenize, device, normalizer)
    else:  # its prompt holds the normalised state
        state: Step = ("pi05_prepare_state_tokenizer_processor_step", {})
        steps = (rename, batch, normalizer, state, tokenize, device)
    named = {f"model.{name}": value for name, value in weights(policy).items()}
    return LerobotExport(config, named, image=None, steps=steps)
