"""Open-loop action error: sampled chunks against the dataset's, in the dataset's units, dimension by dimension.

On a fixed subset of the validation windows the policy samples a chunk from noise keyed by the window; prediction and
truth go back through the norm head's statistics. Nothing is executed: the error says how near the policy's first plan
is to what was done, over the whole horizon of the chunk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.batch import Batch
from opentau_train.config.settings import ValidationSettings
from opentau_train.data.chunk import chunk_rows, row_step
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.stopping import StopFlag
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World
from opentau_train.models.draws import Draws
from opentau_train.models.policy import Policy
from opentau_train.validation.plan import ValidationPlan
from opentau_train.validation.plots import Panel, draw_panels
from opentau_train.validation.rounds import Rounds, evaluating

PREFIX = "Validation-Action"
ACTION_DRAW = 1 << 20
"""The noise's draw number: no draw of the loss has it."""


@dataclass(frozen=True)
class Dimension:
    """An action dimension: its `name` as a tag, its `unit` (rad, rad_s, m, m_s, gripper, or "" where the name doesn't
    tell), and for a gripper the value between closed and open."""

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


def dimensions(mixture: Mixture, head: str) -> list[Dimension]:
    """The action dimensions of a norm head, in the dataset's order."""
    stats = mixture.stats[head]
    middle = (stats.actions.min + stats.actions.max) / 2
    names = [re.sub(r"[^\w-]+", ".", name).strip(".").removeprefix("action.") for name in stats.action_names]
    return [Dimension(n, unit_of(full), float(m)) for n, full, m in zip(names, stats.action_names, middle, strict=True)]


@dataclass(frozen=True)
class ActionScores:
    """`row` of tags; `picture` [H, W, 3] uint8 of the plotted windows, None where none are; equal on all ranks."""

    row: dict[str, float]
    picture: NDArray[np.uint8] | None = field(repr=False)


@torch.no_grad()
def measure_actions(
    policy: Policy,
    replicas: Replicas,
    plan: ValidationPlan,
    world: World,
    settings: ValidationSettings,
    stop: StopFlag | None = None,
    place: Progress | None = None,
) -> ActionScores:
    """Sample a chunk for every window of `plan`; every rank must call it. One all-reduce; raises as `evaluate`.

    Tags: `Validation-Action/{dataset}/{control_mode}/{dimension}/{MAE_unit}` over the chunk's valid steps,
    `{dimension}/Agreement` (share of steps on the true side of half-open) for grippers, and for each unit
    `MAE_unit`, `MAE_unit/First` and `MAE_unit/Last`: all its dimensions, at all steps, the chunk's first, its last.
    """
    mixture = plan.mixture
    steps, dims = mixture.spec.chunk_length, mixture.spec.action_dim
    sums = torch.zeros(len(mixture.groups), steps, dims, 3, dtype=torch.float64)  # |error|, agreement, count
    shown = _plotted(plan, settings.num_action_plots)
    chunks = torch.zeros(len(shown), 3, steps, dims, dtype=torch.float64)  # true, predicted, valid
    rounds = Rounds(plan, replicas, world, settings, stop, place)
    with evaluating(policy, replicas):
        for batch, t in rounds:
            draws = Draws(batch.key, ACTION_DRAW)
            with world.accelerator.autocast():
                sampled = policy.sample_actions(batch, draws)
            _add(sums, chunks, shown, mixture, batch, sampled, t)
    packed = torch.cat([sums.flatten(), chunks.flatten(), rounds.outcome()])
    world.sum(packed)
    parts = packed.split([sums.numel(), chunks.numel(), 4])
    rounds.settle(parts[2])
    values = parts[0].view_as(sums).numpy()
    row: dict[str, float] = {}
    for g in range(len(mixture.groups)):
        row |= group_row(values[g], mixture, g)
    return ActionScores(row, _draw(plan, shown, parts[1].view_as(chunks).numpy()))


def _add(
    sums: torch.Tensor,
    chunks: torch.Tensor,
    shown: NDArray[np.int64],
    mixture: Mixture,
    batch: Batch,
    sampled: torch.Tensor,
    t: NDArray[np.int64],
) -> None:
    """Add the first `len(t)` rows of a batch to the sums, and the plotted ones among them to the chunks."""
    truth, predicted = batch.actions.cpu().numpy(), sampled.float().cpu().numpy()
    state = batch.state.cpu().numpy()
    valid = ~batch.action_is_pad.cpu().numpy()
    for i, place in enumerate(t):
        head = batch.norm_head[i]
        units = partial(mixture.pipelines[int(batch.dataset_index[i])].units, norm_head=head, state=state[i])
        true, guess = units(truth[i]).astype(float), units(predicted[i]).astype(float)
        middle = np.array([d.middle for d in dimensions(mixture, head)])
        num = true.shape[1]
        mine = np.stack([np.abs(guess - true), (guess > middle) == (true > middle), np.ones_like(true)], axis=-1)
        sums[int(batch.group[i]), :, :num] += torch.from_numpy(np.where(valid[i][:, None, None], mine, 0.0))
        for row in np.flatnonzero(shown == place):
            chunks[row, :, :, :num] = torch.from_numpy(
                np.stack([true, guess, np.where(valid[i][:, None], mine[..., 2], 0.0)])
            )


def group_row(sums: NDArray[np.float64], mixture: Mixture, group: int) -> dict[str, float]:
    """The tags of one group from its sums [T, A, 3]; none where nothing was sampled."""
    row: dict[str, float] = {}
    known = dimensions(mixture, mixture.groups[group].norm_head)
    prefix = f"{PREFIX}/{mixture.groups[group].tag}"
    if not sums[..., 2].any():
        return row
    for d, dimension in enumerate(known):
        error, agreed, count = sums[:, d].sum(0)
        row[f"{prefix}/{dimension.name}/{_mae(dimension.unit)}"] = float(error / count)
        if dimension.unit == "gripper":
            row[f"{prefix}/{dimension.name}/Agreement"] = float(agreed / count)
    last = int(np.flatnonzero(sums[:, 0, 2])[-1])
    for unit in dict.fromkeys(dimension.unit for dimension in known):
        mine = [d for d, dimension in enumerate(known) if dimension.unit == unit]
        error, count = sums[:, mine, 0].sum(1), sums[:, mine, 2].sum(1)
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


def _draw(plan: ValidationPlan, shown: NDArray[np.int64], chunks: NDArray[np.float64]) -> NDArray[np.uint8] | None:
    rows: list[Sequence[Panel]] = []
    for t, (true, guess, valid) in zip(shown, chunks, strict=True):
        item = int(plan.item[t])
        group = plan.mixture.groups[plan.group_of[item]]
        place = f"{group.tag} episode {plan.episodes[item][1]} frame {int(plan.windows.frame[t])}"
        steps = int(valid[:, 0].sum())
        rows.append(
            [
                Panel(place if d == 0 else "", f"{x.name} [{x.unit or '-'}]", true[:steps, d], guess[:, d])
                for d, x in enumerate(dimensions(plan.mixture, group.norm_head))
            ]
        )
    return draw_panels(rows) if rows else None
