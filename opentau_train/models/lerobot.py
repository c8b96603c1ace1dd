"""A policy as LeRobot 0.4 loads it: what its class says of itself, for `tools.export format=lerobot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opentau_train.errors import UserError
from opentau_train.types import BatchSpec

NORMALIZER = "normalizer_processor"
Step = tuple[str, dict[str, Any]]
STEPS: tuple[Step, ...] = (
    ("rename_observations_processor", {"rename_map": {}}),
    ("to_batch_processor", {}),
    ("device_processor", {"device": "cpu", "float_dtype": None}),
    (NORMALIZER, {}),
)


@dataclass(frozen=True)
class LerobotExport:
    """`config`: the content of config.json but for features and normalisation, its `type` first; `weights` {LeRobot's
    name: tensor}; `steps` of the preprocessor, (registered name, options), the normaliser's options left out; `image`
    (mean, deviation) of colours in [0, 1], by which pictures are normalised; None: they stay in [0, 1]."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    image: tuple[tuple[float, ...], tuple[float, ...]] | None
    steps: tuple[Step, ...] = STEPS


def check_inputs(name: str, spec: BatchSpec, *, needs_state: bool = True) -> None:
    """Raises `UserError` for a policy that lacks an input which LeRobot's class `name` can't do without."""
    if not spec.cameras or (needs_state and not spec.state_dim):
        raise UserError(
            f"LeRobot's {name} needs a camera" + (" and a state" if needs_state else ""),
            where="format",
            remedy="set format=safetensors",
        )
