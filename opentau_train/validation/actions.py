"""Open-loop action error: sampled chunks against the dataset's, in the dataset's units, dimension by dimension.

On a fixed subset of the validation windows the policy samples a chunk from noise keyed by the window; prediction and
truth go back through the norm head's statistics. Nothing is executed: the error says how near the policy's first plan
is to what was done, over the whole horizon of the chunk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.config.bounds import at_least, positive
from opentau_train.config.modes import PREDICT_ACTIONS
from opentau_train.config.settings import ValidationSettings
from opentau_train.data.batch import Batch
from opentau_train.data.chunk import chunk_rows, row_step
from opentau_train.data.convention import Part
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.transforms.base import Record
from opentau_train.models.draws import ACTION_DRAW, Draws
from opentau_train.types import Group
from opentau_train.validation.evaluator import Attachment, Context, Evaluation, Evaluator, Picture
from opentau_train.validation.plan import ValidationPlan, plan_validation
from opentau_train.validation.plots import Panel, as_json, draw_panels

PREFIX = "Validation-Action"


@dataclass(frozen=True)
class Dimension:
    """An action dimension: its `name` as a tag, its `unit` (as declared, else rad, rad_s, m, m_s, gripper, or "" where
    the name doesn't tell), and for a gripper the value between closed and open."""

    name: str
    unit: str
    middle: float


def unit_of(name: str) -> str:
    """The unit that a dimension's name tells, "" where it doesn't. In LeRobot's datasets joints are in radians and
    poses are x, y, z in metres followed by angles in radians; `dimension_names` numbers unnamed dimensions."""
    low = name.lower()
    column, _, last = low.replace("[", ".").rstrip("]").rpartition(".")
    if "gripper" in low:
        return "gripper"
    rate = "_s" if "velocity" in low or low.endswith("_vel") else ""
    if last in ("x", "y", "z") or last.endswith(("_x", "_y", "_z", "pos_x", "pos_y", "pos_z")):
        return "rad" + rate if any(word in low for word in ("rot", "angle", "euler", "orient")) else "m" + rate
    if last in ("roll", "pitch", "yaw", "rx", "ry", "rz") or last.endswith(("roll", "pitch", "yaw")):
        return "rad" + rate
    if "cartesian" in column and last.isdigit():
        return ("m" if int(last) < 3 else "rad") + rate
    return "rad" + rate if "joint" in low else ""


def dimensions(mixture: Mixture, group: Group) -> list[Dimension]:
    """The action dimensions of a group's robot, in the dataset's order."""
    stats = mixture.stats[group.norm_head]
    dataset = next(d for d in mixture.datasets if d.name == group.dataset)
    ends = np.stack([np.atleast_2d(stats.actions.min).min(0), np.atleast_2d(stats.actions.max).max(0)])
    record: Record = {"state": stats.state.mean, "actions": ends, "norm_head": group.norm_head}
    for transform in reversed(list(dataset.transforms.values())):
        record = transform.inverse(record)
    middle = (record["actions"][0] + record["actions"][1]) / 2
    full = dataset.conversions.robot_names if dataset.conversions.transforms else stats.action_names
    parts = dataset.robot_parts if len(dataset.robot_parts) == len(full) else (None,) * len(full)
    names = [re.sub(r"[^\w-]+", ".", name).strip(".").removeprefix("action.") for name in full]
    units = [declared_unit(part) or unit_of(name) for part, name in zip(parts, full, strict=True)]
    return [Dimension(*values) for values in zip(names, units, middle.tolist(), strict=True)]


def declared_unit(part: Part | None) -> str:
    """The unit that a source declares, "" where it doesn't."""
    if part is None or part.kind == "gripper":
        return "" if part is None else "gripper"
    return part.unit if part.unit is not None and part.unit != "none" else ""


class ActionEvaluator(Evaluator):
    """`Validation-Action/{dataset}/{control_mode}/{dimension}/{MAE_unit}` over the chunk's valid steps,
    `{dimension}/Agreement` (share of steps on the true side of half-open) for grippers, and for each unit `MAE_unit`,
    `MAE_unit/First` and `MAE_unit/Last`: all its dimensions, at all steps, the chunk's first, its last.

    `max_samples_per_group`: windows a (dataset, control_mode), a fixed systematic sample, at most the settings' own;
    `num_plots`: windows of the whole mixture that are drawn, predicted against true.
    """

    def __init__(self, max_samples_per_group: int = 32, num_plots: int = 4):
        positive("validation.evaluator.action.max_samples_per_group", max_samples_per_group)
        at_least("validation.evaluator.action.num_plots", num_plots, 0)
        self.max_samples_per_group, self.num_plots = max_samples_per_group, num_plots

    def plan(self, mixture: Mixture, settings: ValidationSettings, batch_size: int, num_ranks: int) -> ValidationPlan:
        limit = min(self.max_samples_per_group, settings.max_samples_per_group or self.max_samples_per_group)
        return plan_validation(mixture, limit, batch_size=batch_size, num_ranks=num_ranks, modes=PREDICT_ACTIONS)

    def run(self, context: Context) -> Evaluation:
        """Sample a chunk for every window of the plan. One all-reduce; raises as `Context.measure`."""
        plan = context.plan
        errors = _Errors(plan.mixture, _plotted(plan, self.num_plots))

        def visit(batch: Batch, t: NDArray[np.int64]) -> None:
            errors.add(batch, context.policy.sample_actions(batch, Draws(batch.key, ACTION_DRAW)), t)

        totals = context.measure(visit, {"sums": errors.sums, "chunks": errors.chunks})
        row: dict[str, float] = {}
        for group, dims, sums in zip(plan.mixture.groups, errors.dims, totals.sums["sums"].numpy(), strict=True):
            row |= group_row(sums, dims, f"{PREFIX}/{group.tag}")
        panels = _panels(plan, errors, totals.sums["chunks"].numpy())
        if not panels:
            return Evaluation(row, left_out=totals.left_out)
        pictures = (Picture("actions", f"{PREFIX}/Chunks", draw_panels(panels)),)
        return Evaluation(row, pictures, totals.left_out, files=(Attachment("actions", ".json", as_json(panels)),))


class _Errors:
    """Sampled chunks against the dataset's, in the dataset's units.

    `sums` [G, T, A, 3] float64 of |error|, agreement and count by group; `chunks` [P, 3, T, A] float64: true,
    predicted and valid, of the P windows numbered `plotted`; `dims`: each group's dimensions.
    """

    def __init__(self, mixture: Mixture, plotted: NDArray[np.int64]):
        self.mixture, self.plotted = mixture, plotted
        self.dims = [dimensions(mixture, group) for group in mixture.groups]
        steps, dims = mixture.spec.chunk_length, max(mixture.spec.action_dim, *map(len, self.dims))
        self.sums = torch.zeros(len(mixture.groups), steps, dims, 3, dtype=torch.float64)
        self.chunks = torch.zeros(len(plotted), 3, steps, dims, dtype=torch.float64)

    def add(self, batch: Batch, sampled: torch.Tensor, t: NDArray[np.int64]) -> None:
        """Add the first `len(t)` rows of a batch; `sampled` [B, T, A], normalised."""
        targets, samples = batch.actions.cpu().numpy(), sampled.float().cpu().numpy()
        valid, state = ~batch.action_is_pad.cpu().numpy(), batch.state.cpu().numpy()
        for i, number in enumerate(t):
            head = batch.norm_head[i]
            pipeline = self.mixture.pipelines[int(batch.dataset_index[i])]
            true, predicted = (pipeline.units(x[i], head, state=state[i]).astype(float) for x in (targets, samples))
            middle = np.array([dimension.middle for dimension in self.dims[int(batch.group[i])]])
            num, whole = true.shape[1], np.ones_like(true)
            terms = np.stack([np.abs(predicted - true), (predicted > middle) == (true > middle), whole], axis=-1)
            self.sums[int(batch.group[i]), :, :num] += torch.from_numpy(np.where(valid[i][:, None, None], terms, 0.0))
            curves = torch.from_numpy(np.stack([true, predicted, np.where(valid[i][:, None], whole, 0.0)]))
            self.chunks[self.plotted == number, :, :, :num] = curves


def group_row(sums: NDArray[np.float64], dims: Sequence[Dimension], prefix: str) -> dict[str, float]:
    """The tags of one group from its sums [T, A, 3] over its dimensions `dims`; none where nothing was sampled."""
    row: dict[str, float] = {}
    if not sums[..., 2].any():
        return row
    for d, dimension in enumerate(dims):
        error, agreed, count = sums[:, d].sum(0)
        row[f"{prefix}/{dimension.name}/{_mae(dimension.unit)}"] = float(error / count)
        if dimension.unit == "gripper":
            row[f"{prefix}/{dimension.name}/Agreement"] = float(agreed / count)
    last = int(np.flatnonzero(sums[:, 0, 2])[-1])
    for unit in dict.fromkeys(dimension.unit for dimension in dims):
        columns = [d for d, dimension in enumerate(dims) if dimension.unit == unit]
        error, count = sums[:, columns, 0].sum(1), sums[:, columns, 2].sum(1)
        row[f"{prefix}/{_mae(unit)}"] = float(error.sum() / count.sum())
        row[f"{prefix}/{_mae(unit)}/First"] = float(error[0] / count[0])
        row[f"{prefix}/{_mae(unit)}/Last"] = float(error[last] / count[last])
    return row


def _mae(unit: str) -> str:
    return f"MAE_{unit}" if unit else "MAE"


def _plotted(plan: ValidationPlan, num: int) -> NDArray[np.int64]:
    """`t` of the windows to draw: spread evenly over those with a whole chunk inside the episode, if there are any."""
    windows, datasets = plan.windows, plan.mixture.datasets
    rows = np.array([chunk_rows(d.chunk_length, row_step(d.source.fps, d.settings.fps)) for d in datasets], np.int64)
    length = [datasets[d].source.episodes.length[e] for d, e in zip(windows.dataset, windows.episode, strict=True)]
    whole = windows.frame + rows[windows.dataset] <= np.array(length, np.int64)
    t = windows.t[whole] if whole.any() else windows.t
    return t[np.unique(np.arange(num) * len(t) // max(1, num))] if len(t) else t


def _panels(plan: ValidationPlan, errors: _Errors, chunks: NDArray[np.float64]) -> list[Sequence[Panel]]:
    """The plotted windows' `chunks` [P, 3, T, A], a row each."""
    rows: list[Sequence[Panel]] = []
    for t, (true, predicted, valid) in zip(errors.plotted, chunks, strict=True):
        number, place = int(plan.group_of[plan.item[t]]), plan.place(int(t))
        steps = int(valid[:, 0].sum())
        rows.append(
            [
                Panel(place, f"{x.name} [{x.unit or '-'}]", true[:steps, d], predicted[:, d])
                for d, x in enumerate(errors.dims[number])
            ]
        )
    return rows
