"""What a user of a policy's weights must know: a part of its `card`. Made of a mixture, which a robot has none of."""

from __future__ import annotations

from typing import Any

import numpy as np

from opentau_train.data.conventions.sources import record
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.split import held_out_episodes


def convention_of(mixture: Mixture) -> dict[str, Any]:
    """What a user of the weights must know of inputs and outputs."""
    return {
        "actions": "as the dataset's action columns, after its transforms, normalised by the norm head's statistics",
        "normalization": mixture.settings.normalization,
        "conventions": record([d.conversions for d in mixture.datasets]),
        "spec": mixture.spec.to_json(),
        "transforms": {
            d.name: pipeline.to_json() for d, pipeline in zip(mixture.datasets, mixture.pipelines, strict=True)
        },
        "datasets": {
            d.name: sorted({mixture.groups[g].norm_head for g in np.unique(d.group_of)}) for d in mixture.datasets
        },
        "norm_heads": {g.norm_head: list(mixture.stats[g.norm_head].action_names) for g in mixture.groups},
        "fps": {d.name: d.source.fps for d in mixture.datasets},
        "action_names": {d.name: list(d.action_names) for d in mixture.datasets},
        "robots": {d.name: d.robot() for d in mixture.datasets},
        "held_out": held_out_episodes(mixture),
    }
