"""What a sample is used for, its mode, and the future frames that some modes learn with.

docs/models.md has what each mode sees and is trained on. Torch is not imported here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from opentau_train.config.typed import at_least, positive
from opentau_train.errors import UserError, did_you_mean

MODES = ("policy", "wam", "forward_dynamics", "inverse_dynamics")
"""A source's mode is one of them, or `joint`, which draws one for each sample."""
WITH_FUTURE = MODES[1:]
"""The modes whose samples have future frames."""
PREDICT_ACTIONS = ("policy", "wam", "inverse_dynamics")
"""The modes whose actions are predicted. `forward_dynamics` is shown them."""

_NO_MORE = {"flow": "model.ce_weight=0", "tokens": "model.mse_weight=0"}
"""{mode of older versions: what says the same now}"""
_EXAMPLE = "{policy:0.5,wam:0.5}"


@dataclass(frozen=True)
class FutureSettings:
    """The future frames of a window: `data.future`."""

    num_frames: int = 0
    stride: int = 1
    """Steps of the action chunk from the window's frame to the first one, and from each to the next."""
    cameras: tuple[str, ...] | None = None
    """Of which cameras; null = of all."""

    def check(self, path: str) -> None:
        at_least(f"{path}.num_frames", self.num_frames, 0)
        positive(f"{path}.stride", self.stride)


def shares_of(mode: str, probabilities: Mapping[str, float]) -> dict[str, float]:
    """{mode: the share of a source's samples that have it}, in the order of `MODES`, from the source's settings `mode`
    and `mode_probabilities`."""
    given = probabilities if mode == "joint" else {mode: 1.0}
    return {name: given[name] / sum(given.values()) for name in MODES if given.get(name)}


def check_mode(mode: str, probabilities: Mapping[str, float], path: str) -> None:
    """Raises `UserError` where the two settings of the source at `path` are wrong, or don't fit."""
    key, joint = f"{path}.mode_probabilities", mode == "joint"
    remedy = f"set '{key}={_EXAMPLE}'" if joint else f"set {path}.mode=joint, or leave {key} out"
    if mode in _NO_MORE:
        raise UserError(
            f"{path}.mode={mode} is no more: which losses count is the model's to say",
            remedy=f"set {path}.mode=policy {_NO_MORE[mode]}",
        )
    if mode not in (*MODES, "joint"):
        remedy = f"set {path}.mode to one of {', '.join(MODES)}, joint"
        raise UserError(f"{path}.mode={mode} is not known{did_you_mean(mode, MODES)}", remedy=remedy)
    if joint != bool(probabilities):
        what = "needs" if joint else "takes no"
        raise UserError(f"{path}.mode={mode} {what} {key}", remedy=remedy)
    for name, share in probabilities.items():
        if name not in MODES:
            near = did_you_mean(name, MODES)
            raise UserError(f"{key} has an unknown mode '{name}'{near}", remedy=f"known are {', '.join(MODES)}")
        if not 0 <= share < math.inf:
            raise UserError(f"{key}.{name} must be 0 or more, got {share}", remedy=remedy)
    if joint and not sum(probabilities.values()):
        raise UserError(f"{key} are all 0", remedy=remedy)


def check_expected(mode: str, expected: str | None, key: str) -> None:
    """Raises `UserError` where the setting `key` of a source is another `mode` than the one that the recipe is named
    for, `data.expect_mode`."""
    if expected not in (None, mode):
        raise UserError(
            f"{key}={mode} in a recipe that is named for the mode {expected}: under that name samples of another mode "
            "would be trained on, and dilute its losses",
            remedy=f"set {key}={expected}, or choose another recipe; data.expect_mode=null trains it nevertheless",
        )


def check_future(modes: Iterable[str], future: FutureSettings, key: str) -> None:
    """Raises `UserError` where samples of a source, whose mode is the setting `key`, lack future frames."""
    mode = next((mode for mode in modes if mode in WITH_FUTURE), None)
    if mode is not None and not future.num_frames:
        raise UserError(
            f"{mode} learns with future frames, and data.future.num_frames is 0",
            where=key,
            remedy="set data.future.num_frames=4, or leave the mode out",
        )
