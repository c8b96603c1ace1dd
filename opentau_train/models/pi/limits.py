"""What a pi policy holds of the data: known of the settings before the data are opened, and of the data themselves."""

from __future__ import annotations

from collections.abc import Mapping

from opentau_train.errors import UserError

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
