"""What happened between two log lines: losses by group, times, memory, the batch's make-up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from opentau_train.data.decode.video import OpenDecoders
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.quality import ShuffleQuality
from opentau_train.data.order.tape import Tape
from opentau_train.distributed.performance import ForwardFlops, Stamp, memory_row, utilization
from opentau_train.distributed.world import World
from opentau_train.metrics.sums import Sums, training_row
from opentau_train.step import StepTaken, TrainState


@dataclass(frozen=True)
class Reading:
    """The results of the steps since the last row, on the host: `sums` [G, K, 2] float64 of this rank's losses; the
    last step's `grad_norm`; steps `skipped` since the run began, and of those the last ones `in_a_row`."""

    sums: torch.Tensor = field(repr=False)
    grad_norm: float
    skipped: int
    in_a_row: int


class Meter:
    """Gathers the steps of an interval; every rank has one, because the interval's sums are a collective."""

    def __init__(self, mixture: Mixture, tape: Tape, state: TrainState, world: World, flops: ForwardFlops | None):
        self.mixture, self.tape, self.state, self.world, self.flops = mixture, tape, state, world, flops
        self.quality = ShuffleQuality(tape, mixture.settings.correlation)
        self.terms = tuple(state.policy.loss_weights)
        self.open_decoders = OpenDecoders()
        self._begin()

    def _begin(self) -> None:
        """Begin an interval."""
        samples = ("samples",) if len(self.mixture.spec.modes) > 1 else ()
        self.sums = Sums(len(self.mixture.groups), self.terms + samples, self.world.device)
        self.stamps: list[tuple[Stamp, Stamp, Stamp]] = []
        self.wait = self.save = 0.0
        self.num_tokens = 0
        self.started = time.perf_counter()

    def add(self, taken: StepTaken, num_tokens: int = 0) -> None:
        """Add a step of a global batch of `num_tokens`; nothing is read from the device."""
        for group, terms in taken.losses:
            one = torch.ones(len(group), device=group.device)
            self.sums.add(group, {**terms, "samples": (one, one)})
        self.stamps.append(taken.stamps)
        self.num_tokens += num_tokens
        self.last = taken

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time spent inside counts as the wait for a step's data."""
        before = time.perf_counter()
        yield
        self.wait += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent inside, in a validation or a save, doesn't count as the steps'."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The time spent inside counts as a save's, which the next row shows, and not as the steps'."""
        before = time.perf_counter()
        with self.paused():
            yield
        self.save += time.perf_counter() - before

    def read(self) -> Reading:
        """Wait for the device to come to the end of the last step, and read the interval's results in one copy."""
        parts = [self.last.grad_norm[None].double(), self.state.skipped.double(), self.sums.values.flatten()]
        numbers = torch.cat(parts).cpu()
        grad_norm, skipped, in_a_row = numbers[:3].tolist()
        return Reading(numbers[3:].view_as(self.sums.values), grad_norm, int(skipped), int(in_a_row))

    def row(self, reading: Reading, counters: Mapping[str, int]) -> dict[str, float]:
        """The interval's row, and the start of a new interval; collective: it sums the losses over ranks. `counters`
        since the run began: of `bad` windows, which were substituted, and `cut` prompts."""
        groups, sums = self.mixture.groups, self.world.sum(reading.sums).numpy()
        batch = self.tape.batch(self.state.step - 1)
        row = training_row(sums, groups, self.terms, self.state.policy.loss_weights)
        row |= {
            "Training/GradNorm": reading.grad_norm,
            "Training/LearningRate": self.last.lr,
            "Training/SkippedSteps": float(reading.skipped),
            "Training/SubstitutedWindows": float(counters["bad"]),
            "Training/CutPrompts": float(counters["cut"]),
            "Training/OpenDecoders": float(self.open_decoders.num),
            "Training/DecoderMemory": self.open_decoders.num_bytes / 2**20,
            **self._costs(),
            **self.quality.row(batch, self.state.step - 1),
            "Training/Epoch": self.tape.epoch_of(self.tape.first_sample(self.state.step)),
            # The ordered sample ids of the step's global batch, hashed to what a float64 holds exactly: equal here
            # means the same batch in the same order.
            "Training/BatchId": float(batch.digest() >> 12),
        }
        self._begin()
        return row

    def _costs(self) -> dict[str, float]:
        """Seconds a step, of the host for the whole and its wait for data, of the device for its work; memory."""
        steps = len(self.stamps)
        seconds = (time.perf_counter() - self.started) / steps
        row = {
            "Timing/Step": seconds,
            "Timing/DataWait": self.wait / steps,
            "Timing/ForwardBackward": sum(middle.seconds_since(begun) for begun, middle, _ in self.stamps) / steps,
            "Timing/Optimizer": sum(end.seconds_since(middle) for _, middle, end in self.stamps) / steps,
            "Training/SamplesPerSecond": self.tape.batch_size / seconds,
            **memory_row(self.world.device),
        }
        if self.state.policy.packing:
            padded = self.tape.batch_size * steps * self.state.policy.padded_tokens
            row["Training/PackingEfficiency"] = self.num_tokens / padded
            row["Training/TokensPerSecond"] = self.num_tokens / (steps * seconds)
        if self.save:
            row["Timing/Save"] = self.save
        if self.flops is not None and self.flops.per_sample is not None:
            name = torch.cuda.get_device_name(self.world.device)
            used = utilization(self.flops.per_sample, self.tape.batch_size / self.world.size, seconds, name)
            row |= {} if used is None else {"Timing/MFU": used}
        return row
