"""What a pi policy holds of the data: known of the settings before the data are opened, and of the data themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentau_train.config.data import DataSettings
from opentau_train.errors import UserError
from opentau_train.models import prompts
from opentau_train.models.pi import action_tokens as chunks

LIMITS = {
    "max_state_dim": ("state dimensions", "choose dimensions in the source"),
    "max_action_dim": ("action dimensions", "choose dimensions in the source"),
    "max_chunk_length": ("steps in a chunk", "lower data.chunk_length"),
}
"""{option: (what it limits, what else can be done)}, in the order of `check_limits`' sizes."""


def check_limits(sizes: tuple[int, int, int], limits: Mapping[str, int | None]) -> None:
    """Raises `UserError` for `sizes` (state dims, action dims, steps of a chunk) above their limits; None: no limit."""
    for has, (key, (words, otherwise)) in zip(sizes, LIMITS.items(), strict=True):
        holds = limits.get(key)
        if holds is not None and has > holds:
            dims = "" if key == "max_chunk_length" else " and, for loaded weights, model.resize_dims=true"
            raise UserError(
                f"the data has {has} {words}, the policy holds {holds}",
                where=f"model.{key}",
                remedy=f"set model.{key}={has}{dims}; or {otherwise}",
            )


def check_insulation(insulate: bool, action_tokens: str) -> None:
    """Raises `UserError` where no loss would reach the language model."""
    if insulate and action_tokens == "none":
        raise UserError(
            "model.insulate=true without action tokens: nothing would train the language model",
            where="model.insulate",
            remedy="set model.action_tokens=binned, or model.insulate=false",
        )


def check_pictures(given: tuple[int, int], takes: int) -> None:
    """Raises `UserError` where the data's pictures (H, W) aren't the image tower's squares."""
    if given != (takes, takes):
        raise UserError(
            f"the policy takes pictures of {takes}x{takes} (H x W), the data gives {given[0]}x{given[1]}",
            where="data.image_size",
            remedy=f"set data.image_size=[{takes},{takes}]",
        )


def check_options(options: Mapping[str, Any], data: DataSettings) -> None:
    """See `Policy.check`."""
    prompts.check_installed("transformers")
    check_insulation(options.get("insulate", False), options.get("action_tokens", "none"))
    prompts.check_vocabulary(options.get("tokenizer_path"), options["vlm"].vocab_size)
    if options.get("action_tokens") == "fast":
        chunks.make_fast(1, options.get("action_tokenizer_path"))
    chunks.make_bins(1, (2, *options.get("bin_range", (0, 1))))
    limits = {key: options[key] for key in LIMITS if key in options}
    check_limits((data.state_dim or 0, data.action_dim or 0, data.chunk_length), limits)
    check_pictures(data.image_size, options["vision"].image_size)
