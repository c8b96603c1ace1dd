"""This rank's share of the plans' windows, read by the same workers in every pass of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from opentau_train.data.load.stream import Shard, ShardDataset
from opentau_train.data.load.workers import SharedNumber, passes
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.windows import Windows
from opentau_train.threads import InterruptibleIterator
from opentau_train.validation.plan import ValidationPlan


@dataclass(frozen=True)
class _Current:
    """The windows of the plan that is being read. `number` lies in memory that is shared with the workers."""

    plans: Sequence[ValidationPlan]
    rank: int
    number: SharedNumber

    def __call__(self, worker: int, num_workers: int) -> Iterator[Windows]:
        return self.plans[self.number.value].for_worker(self.rank, worker, num_workers)


class Reader:
    """Reads one plan after the other, batch by batch.

    The workers start with the first batch that is asked for and live until `close`, so that a pass costs no start of
    processes. Between passes they hold no file open and wait. A pass that isn't read to its end ends them; the next
    one starts new ones.
    """

    def __init__(self, mixture: Mixture, plans: Sequence[ValidationPlan], rank: int, *, skip_bad: bool):
        self._number = SharedNumber()
        self._dataset = ShardDataset(mixture, _Current(plans, rank, self._number), train=False, skip_bad=skip_bad)
        self._shards: InterruptibleIterator[Shard | None] | None = None
        self._begun = False

    def begin(self, number: int) -> None:
        """Read plan `number` from now on."""
        if self._begun:
            self.close()  # an error ended the pass before, of which shards are left
        self._number.value = number

    def next(self, stop: Callable[[], int]) -> Shard | None:
        """The plan's next batch; None when `stop()` turns true before it is there. Raises `Fault` for a worker that
        died, during the pass or since the last one."""
        if self._shards is None:
            data = self._dataset.mixture.settings
            afresh = data.video_decoder == "nvdec"
            shards = passes(self._dataset, data.num_workers, data.prefetch_factor, afresh=afresh)
            self._shards = InterruptibleIterator(shards)
        self._begun = True
        return self._shards.next(stop)

    def end(self, stop: Callable[[], int], *, complete: bool) -> None:
        """The pass is over; `complete`: all of its batches were read."""
        if not complete:
            self.close()
        elif self._begun and self._shards is not None:
            end = self._shards.next(stop)
            assert end is None, "a plan has as many batches as it says"
            self._begun = False

    def close(self) -> None:
        """End the workers."""
        self._begun = False
        if self._shards is not None:
            self._shards.close()
            self._shards = None
