"""The losses of the held-out windows: one list over the whole mixture, equal shares for all ranks, one all-reduce.

The losses are grouped here, from the windows' own addresses; the policy's `forward` knows nothing of datasets. Every
forward has the same batch size, short batches being filled up with rows of weight 0: a matrix product's last bits may
depend on its shape, so a sample's loss would otherwise depend on which other windows there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.data.batch import Batch
from opentau_train.errors import BadSample
from opentau_train.metrics.sums import Sums, exact, validation_row
from opentau_train.models.draws import Draws
from opentau_train.models.policy import Policy
from opentau_train.validation.evaluator import Compared, Context, Evaluation, Evaluator, Scores
from opentau_train.validation.plan import ValidationPlan


class LossEvaluator(Evaluator):
    """`Validation/...`, the losses by group, and with an average of the weights `Validation-EMA/...`, its losses on the
    same windows with the same noise. Its scores choose the best checkpoint, unless `validation.best` names others'."""

    def compared(self, plan: ValidationPlan, policy: Policy) -> Compared:
        names = tuple(f"{dataset}/{number}" for dataset, number in plan.episodes)
        terms, weights = zip(*policy.loss_weights.items(), strict=True)
        return Compared(names, plan.group_of, plan.mixture.groups, weights, plan.episode_of, terms)

    def run(self, context: Context) -> Evaluation:
        """One pass, and one more for the average. Raises as `Context.measure`, and RuntimeError where windows or loss
        elements got lost or counted twice."""
        evaluation = evaluate(context, "Validation")
        if context.ema is None:
            return evaluation
        with context.ema.applied_to(context.policy):
            return dataclasses.replace(evaluation, row=evaluation.row | evaluate(context, "Validation-EMA").row)


def evaluate(context: Context, prefix: str) -> Evaluation:
    """One pass over the losses with the weights as they are; `prefix` begins every tag. One all-reduce."""
    policy, plan, settings = context.policy, context.plan, context.settings
    terms = tuple(policy.loss_weights)
    num = len(plan.group_of)
    losses, expected = Sums(num, terms), Sums(num, terms)
    num_seen = torch.zeros(num, dtype=torch.float64)

    def visit(batch: Batch, t: NDArray[np.int64]) -> None:
        item = torch.from_numpy(plan.item[t])
        num_seen.index_add_(0, item, torch.ones(len(t), dtype=torch.float64))
        counts = policy.term_counts(batch)
        for draw in range(settings.num_noise_draws):
            measured = policy(batch, Draws(batch.key, draw))
            losses.add(item, {k: (s[: len(t)], c[: len(t)]) for k, (s, c) in exact(measured).items()})
            expected.add(item, {k: (counts[k][: len(t)], counts[k][: len(t)]) for k in measured})

    totals = context.measure(visit, {"losses": losses.values, "expected": expected.values[..., 1], "windows": num_seen})
    sums, windows = totals.sums["losses"].numpy(), totals.sums["windows"].numpy()
    check_conservation(plan, sums, totals.sums["expected"].numpy(), windows, totals.left_out)
    row = validation_row(sums, plan.group_of, windows, plan.mixture.groups, terms, policy.loss_weights, prefix)
    scores = Scores(row.get(f"{prefix}/Loss", math.nan), sums)
    if settings.on_bad_sample == "skip":
        row[f"{prefix}-LeftOut/Windows"] = float(len(totals.left_out))
    return Evaluation(row, left_out=totals.left_out, scores=scores)


def check_conservation(
    plan: ValidationPlan, values: NDArray, expected: NDArray, windows: NDArray, left_out: tuple[BadSample, ...]
) -> None:
    """Windows by group equal the plan's (less what was left out), loss elements by group equal the masks'.

    `values` [E, K, 2] the forwards' sums and counts, `expected` [E, K] counts by `term_counts`, `windows` [E] seen.
    Raises RuntimeError naming the first group that differs.
    """
    lacking = Counter((bad.dataset, bad.episode) for bad in left_out)
    planned = plan.num_windows - np.array([lacking[name] for name in plan.episodes], float)
    pairs = [("windows", windows, planned)]
    pairs += [("loss elements", values[:, k, 1], expected[:, k]) for k in range(expected.shape[1])]
    for what, counted, wanted in pairs:
        wrong = np.flatnonzero(counted != wanted)
        if len(wrong):
            group = plan.mixture.groups[plan.group_of[wrong[0]]]
            rows = plan.group_of == plan.group_of[wrong[0]]
            raise RuntimeError(
                f"validation counted {counted[rows].sum():.0f} {what} in {group.tag}, {wanted[rows].sum():.0f} were "
                f"planned; first in episode {plan.episodes[wrong[0]][1]}"
            )
