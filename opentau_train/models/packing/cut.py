"""A rank's samples cut into micro-batches by their tokens: within its own step, so that the order of samples, the
global batch and the losses stay what they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opentau_train.data.batch import Batch
from opentau_train.errors import UserError
from opentau_train.models.policy import Policy

CAP = "data.max_num_tokens_after_packing"


def counted(policy: Policy, batch: Batch, cap: int) -> Batch:
    """A batch in the host's memory with its tokens counted, for a policy that packs. Raises `UserError` for a sample of
    more than `cap` (-1: any number), which metadata didn't tell of (`limits.check_cap`)."""
    counts = policy.num_tokens(batch).numpy()
    tokens = counts.sum(1)
    row = int(tokens.argmax())
    if tokens[row] > cap != -1:
        raise UserError(
            f"a window has {tokens[row]} tokens, more than a micro-batch may have: dataset "
            f"'{batch.dataset_repo_id[row]}', episode {batch.episode_index[row]}, frame {batch.frame_index[row]}",
            where=f"{CAP}={cap}",
            remedy=f"set {CAP}={2 * tokens[row]}: other windows may have more; and go on with resume=auto",
        )
    return batch.counted(counts)


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


def size_of(batch: Batch | None, max_samples: int, max_tokens: int) -> tuple[int, int]:
    """(tokens of a rank's batch, 0 where they aren't counted; micro-batches of it, 1 of none)."""
    if batch is None:
        return 0, 1
    tokens = int(batch.num_tokens.sum()) if "num_tokens" in batch.values else 0
    return tokens, len(micro_batches(batch, max_samples, max_tokens))


def blanked(batch: Batch) -> Batch:
    """A micro-batch for a rank that has none left but must take part in a forward: the first sample, of weight 0."""
    first = batch.rows(slice(0, 1))
    return first.replace(weight=torch.zeros_like(first.weight))
