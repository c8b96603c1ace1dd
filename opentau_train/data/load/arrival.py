"""How a batch gets to the device: copied on the thread that reads the data, so that the training loop doesn't wait."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace

import torch

from opentau_train.data.batch import Batch
from opentau_train.data.load.stream import RankBatch
from opentau_train.errors import UserError
from opentau_train.models.packing.cut import counted
from opentau_train.models.policy import Policy


@dataclass(frozen=True)
class Arrival:
    """A rank's share of a global batch, whose copy to the device is under way.

    `part` is the share as the stream gave it, on the CPU; `counts` {term: supervised loss elements of its samples} are
    all 0 where the stream has ended with an error; `num_cut` of its prompts were cut. The batch is `counted` where the
    policy packs.
    """

    part: RankBatch
    counts: dict[str, float]
    num_cut: int
    _copy: Batch | None = field(repr=False)
    _copied: torch.cuda.Event | None = field(repr=False)

    def on_device(self) -> Batch:
        """The batch on the device. Work given to it from now on waits for the copy; the host doesn't wait."""
        assert self._copy is not None, "a part has a batch or an error"
        if self._copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._copied)
            # Allocated for another stream, which may have the memory back only when this one is done with it.
            self._copy.visit(lambda tensor: tensor.record_stream(stream))
        return self._copy


def arrivals(
    parts: Generator[RankBatch], policy: Policy, device: torch.device, max_tokens: int = -1
) -> Generator[Arrival]:
    """Each of `parts`, a rank's shares of the global batches, with its counts and with its copy to `device` under way.
    Iterate it on a thread of its own.

    To CUDA the copy goes from pinned memory on a stream of its own, beside the computation. A `UserError` of the counts
    (an unknown mode, a sample of more than `max_tokens`) comes as the part's error, as those of the stream do. Closing
    the generator closes `parts`.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with closing(parts):
        for part in parts:
            counts, num_cut = dict.fromkeys(policy.loss_weights, 0.0), 0
            try:
                if part.batch is not None:  # from the masks in the host's memory: the device isn't asked
                    weight = part.batch.weight.double()
                    counts = {k: float(n.double() @ weight) for k, n in policy.term_counts(part.batch).items()}
                    num_cut = policy.num_cut(part.batch)
                    if policy.packing:
                        part = replace(part, batch=counted(policy, part.batch, max_tokens))
            except UserError as error:
                part = RankBatch(None, error=error)
            yield Arrival(part, counts, num_cut, *_send(part.batch, device, stream))


def _send(
    batch: Batch | None, device: torch.device, stream: torch.cuda.Stream | None
) -> tuple[Batch | None, torch.cuda.Event | None]:
    """(the batch on the device, the event that its copy is done or None where there was nothing to copy)."""
    if batch is None:
        return None, None
    # Inside: pinning and copying use the stream's device, not that of a new thread, which is device 0.
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        if stream is not None:
            batch = batch.each(torch.Tensor.pin_memory)
        copy = batch.to(device)
        return copy, None if stream is None else stream.record_event()
