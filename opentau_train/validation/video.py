"""The future that a policy foresees against the one that came: its error, and a picture of both.

On a fixed subset of the validation windows whose mode predicts the future, it is sampled from noise keyed by the
window. Beside it stands the error of a guess that nothing moves: the present frame, copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from opentau_train.config.bounds import at_least, positive
from opentau_train.config.settings import ValidationSettings
from opentau_train.data.batch import Batch
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.errors import UserError
from opentau_train.models.draws import Draws
from opentau_train.validation.actions import ACTION_DRAW
from opentau_train.validation.evaluator import Context, Evaluation, Evaluator, Picture
from opentau_train.validation.plan import ValidationPlan, plan_validation
from opentau_train.validation.plots import INK, MARGIN

PREFIX = "Validation-Video"
PREDICT_FUTURE = ("wam", "forward_dynamics")
"""The modes whose future frames are predicted."""
HEIGHT = 96
"""Pixels of a strip's frames, at most: what travels between the ranks stays small."""


@runtime_checkable
class Foresees(Protocol):
    """A policy that samples the future frames of a batch."""

    future_is_pixels: bool
    """Whether `future_form` is a picture."""

    def sample_future(self, batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
        """{camera: [B, F, ...]} of the mixture's future cameras, in the form of `future_form`."""

    def future_form(self, frames: torch.Tensor) -> torch.Tensor:
        """`frames` [..., 3, H, W] uint8 RGB as the policy foresees them: [..., 3, H, W] f32 in [0, 1], or something
        else [..., P, V] f32."""


class VideoEvaluator(Evaluator):
    """`Validation-Video/{dataset}/{control_mode}/MSE`, over the real future frames of all cameras, `PSNR` in dB of that
    mean, and both below `Copy/` of the present frame in place of the predicted ones. Values are in [0, 1]; of a policy
    that predicts an encoder's features they are those, without a PSNR and pictures.

    `max_samples_per_group`: windows a (dataset, control_mode), a fixed systematic sample, at most the settings' own;
    `num_strips`: windows of the whole mixture that are drawn, predicted below true.
    """

    def __init__(self, max_samples_per_group: int = 32, num_strips: int = 2):
        positive("validation.evaluator.video.max_samples_per_group", max_samples_per_group)
        at_least("validation.evaluator.video.num_strips", num_strips, 0)
        self.max_samples_per_group, self.num_strips = max_samples_per_group, num_strips

    def plan(self, mixture: Mixture, settings: ValidationSettings, batch_size: int, num_ranks: int) -> ValidationPlan:
        if not set(PREDICT_FUTURE) & set(mixture.spec.modes):
            raise UserError(
                "the evaluator 'video' has no future to look at: no source has a mode that predicts one",
                where="validation.evaluators",
                remedy=f"leave it out, or set a source's mode to one of {', '.join(PREDICT_FUTURE)}, joint",
            )
        limit = min(self.max_samples_per_group, settings.max_samples_per_group or self.max_samples_per_group)
        return plan_validation(mixture, limit, batch_size=batch_size, num_ranks=num_ranks, modes=PREDICT_FUTURE)

    def run(self, context: Context) -> Evaluation:
        """Sample the future of every window of the plan. One all-reduce; raises as `Context.measure`, and `UserError`
        where the policy samples none."""
        policy, plan = context.policy, context.plan
        if not isinstance(policy, Foresees):
            raise UserError(
                f"{type(policy).__name__} has no sample_future, which the evaluator 'video' asks for",
                where="validation.evaluators",
                remedy="leave it out",
            )
        errors = _Errors(policy, plan, self.num_strips if policy.future_is_pixels else 0)
        totals = context.measure(errors.add, {"sums": errors.sums, "strips": errors.strips})
        row: dict[str, float] = {}
        for group, (error, copied, count) in zip(plan.mixture.groups, totals.sums["sums"].tolist(), strict=True):
            for name, sum_ in (("", error), ("/Copy", copied)) if count else ():
                row[f"{PREFIX}/{group.tag}{name}/MSE"] = sum_ / count
                if policy.future_is_pixels and sum_:
                    row[f"{PREFIX}/{group.tag}{name}/PSNR"] = -10.0 * math.log10(sum_ / count)
        places = [plan.place(int(t)) for t in errors.drawn]
        pixels = draw_strips(totals.sums["strips"].numpy(), places) if places else None
        pictures = () if pixels is None else (Picture("video", f"{PREFIX}/Strips", pixels),)
        return Evaluation(row, pictures, totals.left_out)


class _Errors:
    """What the windows of a plan add up to, for `Context.measure`.

    `sums` [G, 3] float64 of the squared errors of predicted and copied frames and their counts, by group; `strips`
    [N, C, 2, 1+F, 3, H', W'] float64 in [0, 1], true and predicted, the present frame first, of the N windows numbered
    `drawn`.
    """

    def __init__(self, policy: Foresees, plan: ValidationPlan, num_drawn: int):
        t, spec = plan.windows.t, plan.mixture.spec
        self.policy, self.drawn = policy, t[np.unique(np.arange(num_drawn) * len(t) // max(1, num_drawn))]
        self.sums = torch.zeros(len(plan.mixture.groups), 3, dtype=torch.float64)
        size = [max(1, side * min(HEIGHT, spec.image_size[0]) // spec.image_size[0]) for side in spec.image_size]
        frames = len(self.drawn), len(spec.future_cameras), 2, 1 + spec.future, 3
        self.strips = torch.zeros(*frames, *size, dtype=torch.float64)

    def add(self, batch: Batch, t: NDArray[np.int64]) -> None:
        """Add the first `len(t)` rows of a batch."""
        sampled = self.policy.sample_future(batch, Draws(batch.key, ACTION_DRAW))
        for place, (camera, frames) in enumerate(sampled.items()):
            now, true = (self.policy.future_form(x) for x in (batch.images[camera][:, -1:], batch.future[camera]))
            predicted, real = frames.float(), batch.future_mask[camera][:, None] & ~batch.future_is_pad
            errors = [(x - true).square().flatten(2).sum(2) for x in (predicted, now)]
            terms = torch.stack([*errors, torch.full_like(errors[0], true[0, 0].numel())], dim=2).double()
            rows = torch.where(real[..., None], terms, 0.0).sum(1).cpu()
            self.sums.index_add_(0, batch.group[: len(t)].cpu(), rows[: len(t)])
            for number, row in np.argwhere(self.drawn[:, None] == t):
                strip = torch.stack([torch.cat([now[row], x[row]]) for x in (true, predicted)])
                small = F.interpolate(strip.flatten(0, 1), self.strips.shape[-2:], mode="area")
                self.strips[number, place] = small.unflatten(0, strip.shape[:2]).double().cpu()


def draw_strips(strips: NDArray[np.float64], places: Sequence[str]) -> NDArray[np.uint8]:
    """`[H, W, 3]` uint8: for each window of `strips` [N, C, 2, 1+F, 3, H', W'], under its text, two rows a camera: the
    present frame and the true ones, the same and the predicted ones."""
    num, cameras, two, frames, _, height, width = strips.shape
    rows = (np.moveaxis(strips, -3, -1).clip(0, 1) * 255).round().astype(np.uint8)  # [N, C, 2, 1+F, H', W', 3]
    pixels = rows.swapaxes(3, 4).reshape(num, cameras * two * height, frames * width, 3)
    image = Image.new("RGB", (pixels.shape[2], num * (MARGIN + pixels.shape[1])), "white")
    for n, (block, place) in enumerate(zip(pixels, places, strict=True)):
        top = n * (MARGIN + len(block))
        ImageDraw.Draw(image).text((4, top), place, fill=INK)
        image.paste(Image.fromarray(block), (0, top + MARGIN))
    return np.asarray(image)
