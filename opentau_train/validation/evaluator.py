"""What a validation is made of: an `Evaluator` measures one thing of the policy on held-out windows.

Its `plan` says which windows it reads, the same on every rank. Its `run` gets a `Context`, reads them with
`Context.measure`, and gives an `Evaluation`: numbers and pictures that are equal on all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.config.settings import ValidationSettings
from opentau_train.data.batch import Batch, blank_batch
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.distributed.stopping import StopFlag, Stopped
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World
from opentau_train.errors import BadSample, Explained, Fault
from opentau_train.models.average import Ema
from opentau_train.models.policy import Policy
from opentau_train.threads import first_line
from opentau_train.types import Group
from opentau_train.validation.plan import ValidationPlan, plan_validation
from opentau_train.validation.plots import save_png
from opentau_train.validation.reader import Reader

if TYPE_CHECKING:  # takes 2 s: not where settings are only checked
    from opentau_train.distributed.parallel import Replicas

NOTHING = np.zeros(0, np.int64)
FLAGS = "(flags of the pass)"
"""The name under which a pass's flags (`_Progress.flags`) travel beside an evaluator's sums."""

Visit = Callable[[Batch, NDArray[np.int64]], None]


@dataclass(frozen=True)
class Picture:
    """`pixels` [H, W, 3] uint8, shown under `tag`, and saved as `plots/{file}_{step}.png` of the run."""

    file: str
    tag: str
    pixels: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True)
class Attachment:
    """`content` of a file that nothing but the run's directory shows: `plots/{file}_{step}{suffix}`."""

    file: str
    suffix: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Compared:
    """What two passes can be compared over: the names of E `episodes`, `group_of` [E] i64 each one's place among
    `groups`, and the `weights` of the K terms that are summed by episode; `episode_of` [E] i64: those of the same
    number are one episode, in several modes. `terms`: the K names of losses whose tags are `Validation/...`."""

    episodes: tuple[str, ...]
    group_of: NDArray[np.int64]
    groups: tuple[Group, ...]
    weights: tuple[float, ...]
    episode_of: NDArray[np.int64]
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """What decides which checkpoint is best: `loss`, the aggregate over the mixture (NaN where nothing is supervised),
    and `sums` [E, K, 2] float64 sums and counts of the K terms in the E episodes of the evaluator's `compared`."""

    loss: float
    sums: NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What was measured, equal on all ranks: a `row` of {tag: value}, pictures, the windows that couldn't be read and
    were left out, the `scores` by which checkpoints can be compared, and other `files` for the run's directory."""

    row: dict[str, float]
    pictures: tuple[Picture, ...] = field(default=(), repr=False)
    left_out: tuple[BadSample, ...] = ()
    scores: Scores | None = None
    files: tuple[Attachment, ...] = field(default=(), repr=False)

    def keep(self, folder: Path, step: int) -> None:
        """Write the pictures and files into `folder`, under names that end in the step's number."""
        folder.mkdir(parents=True, exist_ok=True)
        for picture in self.pictures:
            save_png(folder / f"{picture.file}_{step:08d}.png", picture.pixels)
        for file in self.files:
            (folder / f"{file.file}_{step:08d}{file.suffix}").write_bytes(file.content)


class Evaluator(ABC):
    """Measures one thing of the policy. Built as `Class(**options of its YAML)`, on every rank."""

    reads: ClassVar[bool] = True
    """Whether it needs held-out windows."""

    def plan(self, mixture: Mixture, settings: ValidationSettings, batch_size: int, num_ranks: int) -> ValidationPlan:
        """The windows to read: all that are held out, or the settings' fixed sample of each group."""
        return plan_validation(mixture, settings.max_samples_per_group, batch_size=batch_size, num_ranks=num_ranks)

    def compared(self, plan: ValidationPlan, policy: Policy) -> Compared | None:
        """What its scores are of; None where it gives none."""
        return None

    @abstractmethod
    def run(self, context: Context) -> Evaluation:
        """Measure what `context` holds. Collective: every rank calls it and returns the same. Raises as
        `Context.measure`."""


@dataclass(frozen=True)
class Totals:
    """`sums` over all ranks, by name, and all ranks' `left_out` windows, in the ranks' order."""

    sums: dict[str, torch.Tensor]
    left_out: tuple[BadSample, ...]


@dataclass(frozen=True)
class Context:
    """What an evaluator works with: the policy and its average (None where the run keeps none), its own plan, and the
    settings of all evaluators. `stop` asks the rank to leave out the rest; `progress` records every batch, for the
    watchdog; `reader` reads `plan` as its plan `number`."""

    policy: Policy
    replicas: Replicas
    ema: Ema | None
    plan: ValidationPlan
    number: int
    reader: Reader
    world: World
    settings: ValidationSettings
    stop: StopFlag = field(default_factory=StopFlag)
    progress: Progress = field(default_factory=Progress)

    @torch.no_grad()
    def measure(self, visit: Visit, sums: Mapping[str, torch.Tensor]) -> Totals:
        """Call `visit(batch, t)` for this rank's batches of the plan, and add up over the ranks the `sums` (float64 on
        the CPU) that `visit` adds to. Collective, with ONE all-reduce.

        A batch has exactly `plan.batch_size` rows on the world's device; `t` [n] are the numbers of its first n rows
        in the plan's list, the others are fillers of weight 0. A sharded model's forward is a collective: every rank
        then gets as many batches as the busiest one, the missing ones blank (n = 0), and all leave after the same
        batch, which costs one small all-reduce a batch; so `visit` calls the policy equally often for every batch.
        `visit` runs in evaluation mode, without gradients, in the run's precision. Random states and parameters are
        untouched if it leaves them alone.

        Raises on all ranks the first rank's error: of a window that can't be read, a data worker that died or, of a
        policy that isn't sharded, whatever `visit` raises, which others know as a `Fault`; and `Stopped` where any was
        asked to stop.
        """
        progress = _Progress()
        with evaluating(self.policy, self.replicas):
            try:
                for batch, t in self._batches(progress):
                    with self.world.accelerator.autocast():
                        visit(batch, t)
            except Exception as error:
                # Broad, and not to be split: whatever it is, the other ranks are on their way to the sum below, and are
                # told there. A sharded forward that broke off leaves them inside of it.
                if self.replicas.sharded:
                    raise
                progress.broken = error
        totals = self.world.sum_all({**sums, FLAGS: progress.flags(self.stop)})
        return Totals(totals, self._left_out(totals.pop(FLAGS), progress))

    def _batches(self, progress: _Progress) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        plan, sharded, poll = self.plan, self.replicas.sharded, self.stop.poll
        num_own = plan.num_batches_of(self.world.data_rank)
        self.reader.begin(self.number)
        num = plan.num_batches if sharded else num_own
        for number in range(num):
            self.progress.enter("validation", done=number, total=num)
            part = self.reader.next(poll) if number < num_own else None
            progress.error = part.error if part is not None else None
            progress.halted = progress.error is not None or poll() > 0
            if sharded:
                progress.halted = bool(self.world.sum(torch.tensor([float(progress.halted)])).item())
            if progress.halted:
                break
            progress.left_out += part.left_out if part is not None else ()
            batch, t = (None, NOTHING) if part is None else (part.batch, part.t)
            if batch is not None or sharded:
                batch = (blank_batch(plan.mixture.spec) if batch is None else batch).filled_up(plan.batch_size)
                yield batch.to(self.world.device), t
        self.reader.end(poll, complete=not progress.halted)
        self.progress.enter("all-reduce of the validation")

    def _left_out(self, flags: torch.Tensor, progress: _Progress) -> tuple[BadSample, ...]:
        """All ranks' left-out windows, given the summed `flags`. Raises on all the first failed rank's error, or
        `Stopped` where any left the pass."""
        failed, preempted, interrupted, num_left_out = flags.tolist()
        if failed:
            errors = self.world.gather(progress.told(self.world.rank))
            raise progress.broken or next(e for e in errors if e is not None)
        if preempted or interrupted:
            raise Stopped(2 if interrupted else 1)
        if not num_left_out:
            return ()
        gathered = (bad for windows in self.world.gather(progress.left_out) for bad in windows)
        return tuple({(bad.dataset, bad.episode, bad.frame): bad for bad in gathered}.values())  # once for all modes


@dataclass
class _Progress:
    """How a pass went on this rank."""

    error: Explained | None = None
    halted: bool = False
    left_out: list[BadSample] = field(default_factory=list)
    broken: Exception | None = None

    def told(self, rank: int) -> Explained | None:
        """What the other ranks are told of this one's error."""
        if self.broken is None or isinstance(self.broken, Explained):
            return self.broken or self.error
        what = f"the validation failed on rank {rank}: {type(self.broken).__name__}: {first_line(self.broken)}"
        return Fault(what, remedy="look at what that rank printed; once it is mended, go on with resume=auto")

    def flags(self, stop: StopFlag) -> torch.Tensor:
        """[4] float64 for the pass's all-reduce: this rank failed, stopped with code 1 or 2, and left windows out."""
        failed = (self.error or self.broken) is not None
        stopped = not failed and self.halted
        flags = [failed, stopped and stop.code == 1, stopped and stop.code == 2]
        return torch.tensor([*map(float, flags), float(len(self.left_out))], dtype=torch.float64)


@contextmanager
def evaluating(policy: Policy, replicas: Replicas) -> Iterator[None]:
    """The policy in evaluation mode, back in its own mode afterwards and, where sharded, back in its shards."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)
        replicas.reshard()
