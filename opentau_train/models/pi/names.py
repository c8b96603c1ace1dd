"""What published files call the tensors of pi0 and pi0.5.

transformers'      model.vlm..., model.dit..., embed_action_time..., action_out_proj
LeRobot's          model.paligemma_with_expert.paligemma..., ...gemma_expert..., model.action_in_proj, ...
openpi's in torch  the same without the `model.` before
PaliGemma's        language_model..., vision_tower..., multi_modal_projector..., with or without `model.` before
"""

from __future__ import annotations

from dataclasses import replace

from opentau_train.models.weight_map import WeightMap

READS_BYTES = "prompts are read as bytes, which these weights have never seen: set model.tokenizer_path to PaliGemma's"

_VLM = r"^(?:model\.vlm|paligemma_with_expert\.paligemma(?:\.model)?)\."
_EXPERT = r"^(?:model\.dit|paligemma_with_expert\.gemma_expert(?:\.model)?)\."
_HEADS = ("action_token_*",)
"""The heads of the action tokens are this project's: published files have none."""


def _vlm(prefix: str) -> tuple[tuple[str, str], ...]:
    """Renames of PaliGemma's tensors behind `prefix`, a regular expression."""
    tower = rf"{prefix}vision_tower\.(?:vision_model\.)?"
    text = rf"{prefix}language_model\.(?:model\.)?"
    return (
        (rf"{tower}embeddings\.", "vision.embeddings."),
        (rf"{tower}encoder\.layers\.", "vision.layers."),
        (rf"{tower}post_layernorm\.", "vision.norm."),
        (rf"{prefix}multi_modal_projector\.linear\.", "vision.projector."),
        (rf"{text}layers\.(\d+)\.", r"layers.\1.vlm."),
        (rf"{text}norm\.", "vlm_norm."),
        (rf"{text}embed_tokens\.", "token_embed."),
        (rf"{prefix}(?:language_model\.)?lm_head\.", "token_embed."),
    )


def whole(*renames: tuple[str, str]) -> WeightMap:
    """Of a whole policy, with `renames` of its own before all others."""
    return WeightMap(
        renames=(
            (r"^model\.(?=paligemma_with_expert\.|action_|state_proj\.|time_mlp_)", ""),
            (r"^embed_action_time\.", ""),
            *renames,
            *_vlm(_VLM),
            (rf"{_EXPERT}layers\.(\d+)\.", r"layers.\1.expert."),
            (rf"{_EXPERT}norm\.", "expert_norm."),
        ),
        new=_HEADS,
        # The expert's table of tokens and its head, which are never used, and SigLIP's pooling.
        ignored=(
            "*gemma_expert*lm_head*",
            "*gemma_expert*embed_tokens*",
            "model.dit.embed_tokens*",
            "*vision_model.head*",
        ),
        fallback=("*lm_head.weight",),  # the same as the table, which some files leave out
        resized=("state_proj.weight", "action_in_proj.weight", "action_out_proj.*"),
    )


def for_words(weights: WeightMap, tokenizer: str | None) -> WeightMap:
    """The same, with a note where there is no `tokenizer` and bytes are read: such weights are of little use then."""
    return weights if tokenizer else replace(weights, note=READS_BYTES)


def vlm_only() -> WeightMap:
    """Of PaliGemma's own files: the language model and the image tower."""
    return WeightMap(
        renames=_vlm(r"^(?:model\.)?"),
        ignored=("*vision_model.head*",),
        fallback=("*lm_head.weight",),
        part=("vision.*", "token_embed.*", "layers.*.vlm.*", "vlm_norm.*"),
    )
