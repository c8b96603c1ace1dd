"""A policy as LeRobot 0.4 loads it: what its class says of itself, for `tools.export format=lerobot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
