"""Pictures as they might have been: cropped, turned, in another light. The presets are in `conf/data/augment/`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.bounds import at_least, within
from opentau_train.data.decode.fit import fit
from opentau_train.data.names import fits
from opentau_train.data.transforms.augment.pixels import OPERATIONS, Box, Picture, cut_out, place
from opentau_train.data.transforms.base import Record, SampleDraws, Transform

MOST_ENLARGED = 2.0
"""Times the batch's size at which pictures are read at most, so that a crop of them has that size: bilinear scaling
looks at two pixels each way, and what a reader holds grows with the square."""
COLOURS = ("brightness", "contrast", "saturation", "hue", "sharpness")


_LEAST_SHARE = 1e-3
Range = tuple[float, float] | None
Factors = Annotated[Range, within(0.0, 10.0)]
Probability = Annotated[float, within(0.0, 1.0)]


class Drawn(NamedTuple):
    """What is done to all frames of a camera: where they are cropped, turned and moved (see `pixels.place`), the
    operations on their colours in their order, {name of `pixels.OPERATIONS`: its number}, and what is cut out."""

    box: Box = Box()
    degrees: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    operations: tuple[tuple[str, float], ...] = ()
    cutout: Box | None = None


@dataclass(frozen=True)
class Augment(Transform):
    """Augments pictures in training; in validation and on a robot it takes their middle only, `centre`.

    A range is [low, high], in which a number is drawn evenly; null leaves that out. Numbers are drawn for each sample,
    once for all frames of a camera, or of all cameras. Pictures are read so large that a crop has the batch's
    resolution, and leave as the largest inside `size` (H, W), the batch's.
    """

    size: tuple[int, int]
    shared: Literal["camera", "views"] = "camera"
    """Numbers are drawn for each camera, or once for all."""
    crop: Annotated[tuple[float, float], within(_LEAST_SHARE, 1.0)] = (1.0, 1.0)
    """The share of a picture's area that is kept, anywhere in it."""
    aspect: Annotated[tuple[float, float], within(0.1, 10.0)] = (1.0, 1.0)
    """The part's aspect ratio over the picture's; evenly by its logarithm."""
    centre: Annotated[float | None, within(_LEAST_SHARE, 1.0)] = None
    """The share of the area that validation and robots see; null: the middle of `crop`."""
    rotate: Annotated[Range, within(-180.0, 180.0)] = None
    """Degrees."""
    shift: Annotated[Range, within(-1.0, 1.0)] = None
    """To the right and downwards, in shares of the width and the height."""
    fixed: tuple[str, ...] = ()
    """Cameras, by name or pattern, that are not cropped, turned or moved."""
    brightness: Factors = None
    contrast: Factors = None
    saturation: Factors = None
    hue: Annotated[Range, within(-0.5, 0.5)] = None
    """Turns of the circle of hues."""
    sharpness: Factors = None
    random_order: bool = True
    """Whether brightness, contrast, saturation, hue and sharpness come in an order drawn anew."""
    blur: Annotated[Range, within(0.1, 20.0)] = None
    """The Gaussian's sigma in pixels."""
    blur_probability: Probability = 0.5
    cutout: Annotated[Range, within(0.0, 1.0)] = None
    """The share of the area that turns black, in the picture's own aspect ratio."""
    cutout_probability: Probability = 0.5
    only: Annotated[int | None, lambda path, value: at_least(path, value, 1)] = None
    """How many are made at most, drawn anew: of rotating with moving, the five of colour, blur and cutout."""

    reads: ClassVar = ("images",)
    writes: ClassVar = ("images",)

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        images = record["images"].items()
        record["images"] = {camera: self.apply(frames, self.draw(camera, draws)) for camera, frames in images}
        return record

    def evaluate(self, record: Record, draws: SampleDraws) -> Record:
        side = math.sqrt(self.centre_share)
        middle = Drawn(Box((1 - side) / 2, (1 - side) / 2, side, side))
        images = record["images"].items()
        record["images"] = {c: self.apply(frames, Drawn() if self._is_fixed(c) else middle) for c, frames in images}
        return record

    def picture_size(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = min(MOST_ENLARGED, 1.0 / math.sqrt(min(self.crop[0], self.centre_share)))
        return math.ceil(size[0] * scale), math.ceil(size[1] * scale)

    @property
    def crops(self) -> bool:
        """Whether validation and robots see a part of the pictures only."""
        return self.centre_share < 1

    @property
    def centre_share(self) -> float:
        """The share of the area that validation and robots see."""
        return sum(self.crop) / 2 if self.centre is None else self.centre

    def draw(self, camera: str, draws: SampleDraws) -> Drawn:
        """The numbers for the frames of `camera`."""
        whose = "" if self.shared == "views" else camera

        def between(name: str, low: float, high: float) -> float:
            return low if low == high else low + (high - low) * draws.uniform(name, whose)

        chosen = self._chosen(whose, draws)
        colours = [name for name in COLOURS if name in chosen]
        if self.random_order:
            colours.sort(key=lambda name: draws.uniform("order", name, whose))
        numbers = [(name, between(name, *getattr(self, name))) for name in (*colours, *(["blur"] * ("blur" in chosen)))]
        cutout = None
        if "cutout" in chosen and self.cutout is not None:
            side = math.sqrt(between("cutout", *self.cutout))
            cutout = Box(between("cutout left", 0, 1 - side), between("cutout top", 0, 1 - side), side, side)
        drawn = Drawn() if self._is_fixed(camera) else self._placed(between, "affine" in chosen)
        return drawn._replace(operations=tuple(numbers), cutout=cutout)

    def apply(self, frames: NDArray[np.uint8], drawn: Drawn) -> NDArray[np.uint8]:
        """[h+1, H', W', 3] uint8 of frames [h+1, H, W, 3] uint8."""
        size = fit(frames.shape[1], frames.shape[2], self.size)
        return np.stack([_frame(frame, drawn, size) for frame in frames])

    def _placed(self, between: Callable[[str, float, float], float], affine: bool) -> Drawn:
        """Where the frames of a camera are cropped, turned and moved."""
        share = between("share", *self.crop)
        # Inside the picture: a part of all of its width and `share` of its height is as wide as that share can be.
        low, high = (math.log(min(max(aspect, share), 1 / share)) for aspect in self.aspect)
        log_aspect = between("aspect", low, high)
        width, height = (min(1.0, math.sqrt(share) * math.exp(log / 2)) for log in (log_aspect, -log_aspect))
        box = Box(between("left", 0, 1 - width), between("top", 0, 1 - height), width, height)
        if not affine:
            return Drawn(box)
        turned, moved = self.rotate or (0.0, 0.0), self.shift or (0.0, 0.0)
        return Drawn(box, between("degrees", *turned), (between("right", *moved), between("down", *moved)))

    def _chosen(self, whose: str, draws: SampleDraws) -> set[str]:
        """Which parts are made of a sample."""
        affine = self.rotate is not None or self.shift is not None
        names = [name for name in (*COLOURS, "blur", "cutout") if getattr(self, name) is not None] + ["affine"] * affine
        if self.only is not None and self.only < len(names):
            names = sorted(names, key=lambda name: draws.uniform("chosen", name, whose))[: self.only]
        for name, probability in (("blur", self.blur_probability), ("cutout", self.cutout_probability)):
            if name in names and draws.uniform(f"{name}?", whose) >= probability:
                names.remove(name)
        return set(names)

    def _is_fixed(self, camera: str) -> bool:
        return any(fits(camera, pattern) for pattern in self.fixed)


def _frame(picture: Picture, drawn: Drawn, size: tuple[int, int]) -> Picture:
    picture = place(picture, drawn.box, size, drawn.degrees, drawn.shift)
    for name, number in drawn.operations:
        picture = OPERATIONS[name](picture, number)
    return picture if drawn.cutout is None else cut_out(picture, drawn.cutout)
