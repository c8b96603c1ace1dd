"""What happened between two log lines: losses by group, times, the batch's make-up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentau_train.data.decode.video import OpenDecoders
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.quality import ShuffleQuality
from opentau_train.data.order.tape import Tape
from opentau_train.distributed.world import World
from opentau_train.metrics.sums import Sums, training_row
from opentau_train.step import StepResult, TrainState


class Meter:
    """Gathers the steps of an interval; every rank has one, because the interval's sums are a collective."""

    def __init__(self, mixture: Mixture, tape: Tape, state: TrainState, world: World):
        self.mixture, self.tape, self.state, self.world = mixture, tape, state, world
        self.quality = ShuffleQuality(tape, mixture.settings.correlation)
        self.terms = tuple(state.policy.loss_weights)
        self.pending: list[StepResult] = []
        self.wait = 0.0
        self.open_decoders = OpenDecoders()
        self.started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.wait += time.perf_counter() - before

    def add(self, result: StepResult) -> None:
        self.pending.append(result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around a validation or a save, whose time is not the steps'."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def row(self, last: StepResult, num_bad: int) -> dict[str, float]:
        """The interval's row, and the start of a new interval; collective: it sums the losses over ranks. `num_bad`:
        windows substituted since the run began."""
        steps, groups = len(self.pending), self.mixture.groups
        sums = Sums(len(groups), self.terms)
        for result in self.pending:
            for group, terms in result.losses:
                sums.add(group, terms)
        self.world.sum(sums.values)
        seconds = (time.perf_counter() - self.started) / steps
        batch = self.tape.batch(self.state.step - 1)
        row = training_row(sums.values.numpy(), groups, self.terms, self.state.policy.loss_weights)
        row |= {
            "Training/GradNorm": last.grad_norm,
            "Training/LearningRate": last.lr,
            "Training/SkippedSteps": float(self.state.skipped),
            "Training/SubstitutedWindows": float(num_bad),
            "Training/StepTime": seconds,
            "Training/DataWait": self.wait / steps,
            "Training/OpenDecoders": float(self.open_decoders.num),
            "Training/DecoderMemory": self.open_decoders.num_bytes / 2**20,
            "Training/SamplesPerSecond": self.tape.batch_size / seconds,
            **self.quality.row(batch, self.state.step - 1),
            "Training/Epoch": self.tape.epoch_of(self.tape.first_sample(self.state.step)),
            # The ordered sample ids of the step's global batch, hashed to what a float64 holds exactly: equal here
            # means the same batch in the same order.
            "Training/BatchId": float(batch.digest() >> 12),
        }
        self.pending, self.wait, self.started = [], 0.0, time.perf_counter()
        return row
