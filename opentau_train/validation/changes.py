"""What two passes over the same windows differ in, and how far that is to be trusted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opentau_train.metrics.sums import MIN_EPISODES, in_common, paired_difference, validation_row
from opentau_train.validation.evaluator import Compared


def changes(compared: Compared, new: NDArray[np.float64], old: NDArray[np.float64]) -> dict[str, float]:
    """{tag: what it has changed by from `old` to `new`, tag/StdErr: the standard error of that} of the losses, from the
    sums [E, K, 2] of the episodes that both passes saw whole. Empty where there is nothing to compare."""
    both, terms = in_common(new, old), compared.terms
    if both.sum() < MIN_EPISODES or not terms:
        return {}
    new, old, group_of = new[both], old[both], compared.group_of[both]
    change = np.stack([new[..., 0] - old[..., 0], new[..., 1]], axis=-1)
    weights = dict(zip(terms, compared.weights, strict=True))
    row = validation_row(change, group_of, np.ones(len(change)), compared.groups, terms, weights)
    alone = np.eye(len(terms)).tolist()
    for name, of in [("Loss", compared.weights), *zip(map(str.upper, terms), alone, strict=True)]:
        _, error = paired_difference(new, old, group_of, compared.groups, of, compared.episode_of[both])
        row[f"Validation/{name}/StdErr"] = error
    return row
