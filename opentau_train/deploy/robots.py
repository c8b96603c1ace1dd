"""What a policy reads of each kind of robot that it was trained on, and what it gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.checkpoints.pretrained import Loaded
from opentau_train.config import typed
from opentau_train.data.convention import Convention, by_dimension, difference
from opentau_train.data.conventions.places import locate
from opentau_train.data.transforms.normalize import Affine, Normalize
from opentau_train.errors import UserError

READ_BY = (
    *("cameras", "state", "actions", "drop_dims", "prompt_columns", "prompt_separator", "tolerance_s", "fps"),
    *("control_mode", "control_mode_column"),
)
"""Settings of a source that say what a window of it has: nothing of where it lies."""
_RATES_ALIKE = 0.01
"""By which share two rates may differ and be one: 29.97 is 30."""


@dataclass(frozen=True)
class TrainedRange:
    """Smallest and largest action of the training, [A] or [T, A] f64, as the policy is trained on them (after
    `data.convention`), where the dimensions have these `names`; `affine` normalises them."""

    names: tuple[str, ...]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    affine: Affine

    def of_steps(self, num: int) -> tuple[NDArray[np.float64], ...]:
        """`low`, `high` and the `affine`'s offset and scale, each [num, A], of a chunk's steps: the last ones that
        there are count for later steps, too."""
        vectors = [np.atleast_2d(v) for v in (self.low, self.high, self.affine.offset, self.affine.scale)]
        return tuple(v[np.minimum(np.arange(num), len(v) - 1)].astype(np.float64) for v in vectors)


@dataclass(frozen=True)
class Robot:
    """One kind of robot: that of the first dataset with its norm head (robot_type::control_mode).

    `cameras`, and which of them the dataset stores as `videos`; the names of the state's S' and the actions' A'
    dimensions in the robot's own order and units; `fps`, steps of a chunk a second; `chunk_length` T; `convention`,
    what state and actions are, as far as the dataset declares it. `columns` {the dataset's name of a camera: the
    policy's}; `prompt_columns`, the dataset's; `source`, how the training read the dataset's columns (`READ_BY`).
    """

    norm_head: str
    cameras: tuple[str, ...]
    videos: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    fps: float
    chunk_length: int
    convention: Convention
    columns: Mapping[str, str] = field(repr=False)
    prompt_columns: tuple[str, ...] = field(repr=False)
    range: TrainedRange = field(repr=False)
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def check(self, fps: float | None = None, convention: Convention | Mapping[str, Any] | None = None) -> None:
        """Raises `UserError` where a robot runs at another rate than the training's, or where its state and actions
        mean something else."""
        if fps is not None and abs(fps / self.fps - 1) > _RATES_ALIKE:
            raise UserError(
                f"the robot takes {fps:g} actions a second, and the policy was trained on {self.fps:g}",
                where=f"fps, of {self.norm_head}",
                remedy=f"run it at {self.fps:g}, or train with data.sources.NAME.fps={fps:g}",
            )
        if convention is None:
            return
        asked = convention if isinstance(convention, Convention) else typed.build(Convention, convention, "convention")
        for vector, names in (("actions", self.action_names), ("state", self.state_names)):
            own, other = getattr(self.convention, vector), getattr(asked, vector)
            if other is None:
                continue
            parts = [(x.part, place) for x in locate(other, names, f"convention.{vector}") for place in x.places]
            in_order = [part for part, _ in sorted(parts, key=lambda pair: pair[1])]
            differs = "of them nothing is declared" if own is None else difference(by_dimension(own), in_order)
            if differs is not None:
                raise UserError(
                    f"the robot's {vector} are not declared as those that the policy was trained on: {differs}",
                    where=f"convention.{vector}, of {self.norm_head}",
                    remedy="convert them on the robot, or declare what the data has, and train again: "
                    "data.sources.NAME.convention",
                )


def robots_of(loaded: Loaded) -> dict[str, Robot]:
    """{norm head: its robot}. Raises `UserError` where an older version wrote the policy and it can't be told."""
    made: dict[str, Robot] = {}
    for dataset, heads in loaded.meta["datasets"].items():
        for head in heads:
            if dataset in loaded.datasets.get(head, {}) and head not in made:
                made[head] = _robot(loaded, dataset, head)
    return made


def _robot(loaded: Loaded, dataset: str, head: str) -> Robot:
    card, stats = _card(loaded, dataset, head), loaded.stats[head].actions
    source = loaded.meta["config"].get("data", {}).get("sources", {}).get(dataset) or {}
    named = source.get("cameras")
    transforms = loaded.pipelines[head].transforms.values()
    affine = next(t.affine[head]["actions"] for t in transforms if isinstance(t, Normalize))
    return Robot(
        norm_head=head,
        cameras=tuple(card["cameras"]),
        videos=tuple(card["videos"]),
        state_names=tuple(card["state_names"]),
        action_names=tuple(card["action_names"]),
        fps=card["fps"],
        chunk_length=card["chunk_length"],
        convention=typed.build(Convention, card["convention"], f"robots.{dataset}.convention"),
        columns={column: camera for camera, column in named.items()} if isinstance(named, Mapping) else {},
        prompt_columns=tuple(source.get("prompt_columns") or ()),
        source={key: source[key] for key in READ_BY if source.get(key) is not None},
        range=TrainedRange(loaded.stats[head].action_names, stats.min, stats.max, affine),
    )


def _card(loaded: Loaded, dataset: str, head: str) -> Mapping[str, Any]:
    """The entry that `Dataset.robot` wrote."""
    meta, stats = loaded.meta, loaded.stats[head]
    if "robots" in meta:
        return meta["robots"][dataset]
    if meta.get("conventions", {}).get(dataset, {}).get("converted"):
        raise UserError(
            "the policy was saved by an older version, without the names of its robot's dimensions",
            where=head,
            remedy="go on with its run for a step (resume=auto), which saves it anew",
        )
    return {
        "cameras": loaded.spec.cameras,
        "videos": (),
        "state_names": stats.state_names,
        "action_names": stats.action_names,
        "convention": {},
        "fps": meta["fps"][dataset],
        "chunk_length": loaded.spec.chunk_length,
    }
