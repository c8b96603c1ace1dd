"""What a sample is used for, its mode, and the future frames that some modes learn with.

docs/models.md has what each mode sees and is trained on. Torch is not imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from opentau_train.config.bounds import Count, Natural, within
from opentau_train.errors import UserError, did_you_mean

MODES = ("policy", "wam", "forward_dynamics", "inverse_dynamics")
"""A source's mode is one of them, or `joint`, which draws one for each sample."""
WITH_FUTURE = MODES[1:]
"""The modes whose samples have future frames."""
PREDICT_ACTIONS = ("policy", "wam", "inverse_dynamics")
"""The modes whose actions are predicted. `forward_dynamics` is shown them."""

_NO_MORE = {"flow": "model.ce_weight=0", "tokens": "model.mse_weight=0"}
"""{mode of older versions: the loss weight that says the same now}"""


def _known(path: str, mode: str) -> None:
    """Raises `UserError` for no mode."""
    if mode not in (*MODES, "joint"):
        other = f"set {path}=policy and {_NO_MORE[mode]}" if mode in _NO_MORE else f"{', '.join(MODES)} or joint"
        raise UserError(f"there is no {path}={mode}{did_you_mean(mode, MODES)}", remedy=other)


Mode = Annotated[str, _known]
Often = Annotated[float, within(0.0, 1e9)]


@dataclass(frozen=True)
class ModeSettings:
    """How often a sample of `mode=joint` has each mode, relative to the others."""

    policy: Often = 0.0
    """Actions are predicted, without future frames."""
    wam: Often = 0.0
    """Actions and future frames are predicted together."""
    forward_dynamics: Often = 0.0
    """Future frames are predicted; the actions are shown."""
    inverse_dynamics: Often = 0.0
    """Actions are predicted; the future frames are shown."""

    def check(self, path: str) -> None: ...

    def of(self, mode: str) -> dict[str, float]:
        """{mode: the share of the samples that have it}, in the order of `MODES`, of a source whose setting is
        `mode`."""
        given = {name: often for name, often in vars(self).items() if often} if mode == "joint" else {mode: 1.0}
        return {name: often / sum(given.values()) for name, often in given.items()}

    def check_for(self, mode: str, path: str) -> None:
        """Raises `UserError` where the source at `path` has another `mode` than `joint`, or none of these."""
        if (mode == "joint") != any(vars(self).values()):
            are, remedy = "set", f"set {path}.mode=joint, or leave them out"
            if mode == "joint":
                are, remedy = "not set", f"set '{path}.mode_probabilities={{policy:0.5,wam:0.5}}'"
            raise UserError(f"{path}.mode={mode}, and {path}.mode_probabilities are {are}", remedy=remedy)


@dataclass(frozen=True)
class FutureSettings:
    """The future frames of a window: `data.future`."""

    num_frames: Natural = 0
    """How many a window holds of each camera, for the modes that learn with them."""
    stride: Count = 1
    """Steps of the action chunk from the window's frame to the first one, and from each to the next."""
    cameras: tuple[str, ...] | None = None
    """Of which cameras; null = of all."""

    def check(self, path: str) -> None: ...
