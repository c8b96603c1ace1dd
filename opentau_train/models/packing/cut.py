"""A rank's samples cut into micro-batches by their tokens: within its own step, so that the order of samples, the
global batch and the losses stay what they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opentau_train.data.batch import Batch


def first_fit(tokens: Sequence[int], max_samples: int, max_tokens: int) -> list[list[int]]:
    """Samples of so many `tokens` each as micro-batches of at most `max_samples` and `max_tokens` (-1: of any number):
    one after the other goes into the first where it fits. One of more tokens than that is by itself."""
    cut: list[list[int]] = []
    used: list[int] = []
    for row, num in enumerate(tokens):
        fits = (max_tokens < 0 or n + num <= max_tokens for n in used)
        place = next((i for i, fit in enumerate(fits) if fit and len(cut[i]) < max_samples), len(cut))
        if place == len(cut):
            cut.append([])
            used.append(0)
        cut[place].append(row)
        used[place] += num
    return cut


def micro_batches(batch: Batch, max_samples: int, max_tokens: int) -> list[slice | Tensor]:
    """Each micro-batch's rows (`Batch.rows`) by `first_fit`; the tokens are those of a batch that is `counted`."""
    counts = batch.values.get("num_tokens")
    tokens = [0] * len(batch) if counts is None else counts.sum(1).tolist()
    spans = ((rows, slice(rows[0], rows[-1] + 1)) for rows in first_fit(tokens, max_samples, max_tokens))
    return [span if span.stop - span.start == len(rows) else torch.tensor(rows) for rows, span in spans]
