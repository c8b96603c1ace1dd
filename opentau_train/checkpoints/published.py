"""Statistics that others computed, in place of the data's own: `data.statistics_path`.

A policy that is trained further on little data keeps the normalisation that it knows. Read are a run, checkpoint or
exported folder of this program, and openpi's norm_stats.json or the folder that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opentau_train import strangers
from opentau_train.checkpoints.card import read_stats
from opentau_train.checkpoints.pretrained import pretrained_folder
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.normalize import HeadStats, Moments
from opentau_train.errors import UserError, did_you_mean

WHERE = "data.statistics_path"
OPENPI = "norm_stats.json"
VECTORS = ("state", "actions")


def published_statistics(path: str, mixture: Mixture) -> dict[str, HeadStats]:
    """{norm head: statistics} at `path` for the norm heads of `mixture`. Raises `UserError` where one isn't there, or
    has other dimensions than the data after their conversions."""
    place = Path(path).expanduser()
    file = place / OPENPI if place.is_dir() else place
    names = {g.norm_head: (d.state_names, d.action_names) for d in mixture.datasets for g in _groups(mixture, d.name)}
    if file.is_file():
        return _of_openpi(file, names, mixture.settings.normalization)
    found = read_stats(pretrained_folder(place))
    for head, (state, actions) in names.items():
        if head not in found:
            raise _refusal(place, f"there are none of {head}{did_you_mean(head, found)}, but of {', '.join(found)}")
        if (found[head].state_names, found[head].action_names) != (state, actions):
            raise _refusal(place, f"those of {head} are of other dimensions than the data's")
    return {head: found[head] for head in names}


def _groups(mixture: Mixture, dataset: str) -> list[Any]:
    return [group for group in mixture.groups if group.dataset == dataset]


def _of_openpi(
    file: Path, names: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]], normalization: str
) -> dict[str, HeadStats]:
    """One robot's mean, std, q01 and q99 of each dimension; behind those of the data may stand the policy's filling."""
    if len(names) > 1:
        raise _refusal(file, f"they are of one robot, and the mixture has {', '.join(names)}")
    if normalization == "min_max":
        raise _refusal(file, "they hold no smallest and largest values, which data.normalization=min_max needs")
    ((head, (state, actions)),) = names.items()
    try:
        tree = strangers.read_json(file)["norm_stats"]
        columns = {v: {n: np.array(tree[v][n], np.float64) for n in ("mean", "std", "q01", "q99")} for v in VECTORS}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _refusal(file, f"the file can't be read as openpi's: {error!r}") from error
    moments = []
    for vector, dims in zip(VECTORS, (state, actions), strict=True):
        values = {n: column[..., : len(dims)] for n, column in columns[vector].items()}
        if any(column.shape != (len(dims),) for column in values.values()):
            raise _refusal(file, f"they have fewer dimensions of {vector} than the data's {len(dims)}")
        moments.append(Moments(0, **values, min=values["q01"], max=values["q99"]))
    return {head: HeadStats(moments[0], moments[1], state, actions)}


def _refusal(place: Path, why: str) -> UserError:
    return UserError(
        f"the statistics don't fit: {why}", where=f"{WHERE}={place}", remedy=f"set {WHERE}=null to compute them"
    )
