"""The validation pass: one list of windows over the whole mixture, equal shares for all ranks, one all-reduce.

The losses are grouped here, from the windows' own addresses; the policy's `forward` knows nothing of datasets. Every
forward has the same batch size, short batches being filled up with rows of weight 0: a matrix product's last bits may
depend on its shape, so a sample's loss would otherwise depend on which other windows there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.config.settings import ValidationSettings
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.stopping import StopFlag
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World
from opentau_train.errors import BadSample
from opentau_train.metrics.sums import Sums, exact, validation_row
from opentau_train.models.draws import Draws
from opentau_train.models.policy import Policy
from opentau_train.validation.plan import ValidationPlan
from opentau_train.validation.rounds import Rounds, evaluating


@dataclass(frozen=True)
class Scores:
    """What a pass measured, equal on all ranks.

    `row` of tags (`metrics.validation_row`); `sums` [E, K, 2] float64 sums and counts of the plan's rows; `left_out`,
    the windows that couldn't be read, in the ranks' order.
    """

    row: dict[str, float]
    sums: NDArray[np.float64] = field(repr=False)
    left_out: tuple[BadSample, ...] = ()


@torch.no_grad()
def evaluate(
    policy: Policy,
    replicas: Replicas,
    plan: ValidationPlan,
    world: World,
    settings: ValidationSettings,
    prefix: str = "Validation",
    stop: StopFlag | None = None,
    place: Progress | None = None,
) -> Scores:
    """One pass over the losses; every rank must call it and gets the same scores. One all-reduce.

    Ambient random state is untouched. Raises on all ranks the `UserError` of a window that any rank couldn't read,
    `Stopped` when any was asked to (see `Rounds`), and RuntimeError where windows or loss elements got lost or counted
    twice.
    """
    terms = tuple(policy.loss_weights)
    num = len(plan.group_of)
    sums, expected = Sums(num, terms), Sums(num, terms)
    seen = torch.zeros(num, dtype=torch.float64)
    rounds = Rounds(plan, replicas, world, settings, stop, place)
    with evaluating(policy, replicas):
        for batch, t in rounds:
            item = torch.from_numpy(plan.item[t])
            seen.index_add_(0, item, torch.ones(len(t), dtype=torch.float64))
            counts = policy.term_counts(batch)
            for draw in range(settings.num_noise_draws):
                draws = Draws(batch.key, draw)
                with world.accelerator.autocast():
                    found = policy(batch, draws)
                sums.add(item, {k: (s[: len(t)], c[: len(t)]) for k, (s, c) in exact(found).items()})
                expected.add(item, {k: (counts[k][: len(t)], counts[k][: len(t)]) for k in found})
    packed = torch.cat([sums.values.flatten(), expected.values[..., 1].flatten(), seen, rounds.outcome()])
    world.sum(packed)
    parts = packed.split([sums.values.numel(), num * len(terms), num, 4])
    left_out = rounds.settle(parts[3])
    values, windows = parts[0].view_as(sums.values).numpy(), parts[2].numpy()
    check_conservation(plan, values, parts[1].view(num, len(terms)).numpy(), windows, left_out)
    groups = plan.mixture.groups
    row = validation_row(values, plan.group_of, windows, groups, terms, policy.loss_weights, prefix)
    if settings.on_bad_sample == "skip":
        row[f"{prefix}-LeftOut/Windows"] = float(len(left_out))
    return Scores(row, values, left_out)


def check_conservation(
    plan: ValidationPlan, values: NDArray, expected: NDArray, windows: NDArray, left_out: tuple[BadSample, ...]
) -> None:
    """Windows by group equal the plan's (less what was left out), loss elements by group equal the masks'.

    `values` [E, K, 2] the forwards' sums and counts, `expected` [E, K] counts by `term_counts`, `windows` [E] seen.
    Raises RuntimeError naming the first group that differs.
    """
    planned = plan.num_windows.astype(float)
    row_of = {name: row for row, name in enumerate(plan.episodes)}
    for bad in left_out:
        planned[row_of[bad.dataset, bad.episode]] -= 1
    pairs = [("windows", windows, planned)]
    pairs += [("loss elements", values[:, k, 1], expected[:, k]) for k in range(expected.shape[1])]
    for what, found, wanted in pairs:
        wrong = np.flatnonzero(found != wanted)
        if len(wrong):
            group = plan.mixture.groups[plan.group_of[wrong[0]]]
            rows = plan.group_of == plan.group_of[wrong[0]]
            raise RuntimeError(
                f"validation counted {found[rows].sum():.0f} {what} in {group.tag}, {wanted[rows].sum():.0f} were "
                f"planned; first in episode {plan.episodes[wrong[0]][1]}"
            )
