"""Policies and a source that misbehave on purpose, named by `_target_`; their numbers are the plain ones'."""

from __future__ import annotations

import os
import time

import torch

from opentau_train.data.lerobot import LeRobotSource
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.models.flow import FlowPolicy

RANK = int(os.environ.get("RANK", "0"))


class Slow(FlowPolicy):
    """A tenth of a second more a training step: time for a scheduler to act."""

    def forward(self, batch, draws):
        if self.training:
            time.sleep(0.1)
        return super().forward(batch, draws)


class Poisoned(FlowPolicy):
    """On rank 1 the gradient of the third step is not a number; the losses are."""

    steps = 0

    def forward(self, batch, draws):
        terms = super().forward(batch, draws)
        if self.training:
            self.steps += 1
            if RANK == 1 and self.steps == 3:
                terms["mse"][0].register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        return terms


class _ThirdStep(FlowPolicy):
    """On rank 1 the third step does what `happen` does."""

    steps = 0

    def forward(self, batch, draws):
        if self.training:
            self.steps += 1
            if RANK == 1 and self.steps == 3:
                self.happen()
        return super().forward(batch, draws)


class Broken(_ThirdStep):
    """On rank 1 the third step raises."""

    def happen(self):
        raise ZeroDivisionError("division by a broken part")


class Stuck(_ThirdStep):
    """On rank 1 the third step never ends."""

    def happen(self):
        while True:
            time.sleep(0.1)


class Dropout(FlowPolicy):
    """Hides half of the state's dimensions at random while it trains, by the ambient generator."""

    def forward(self, batch, draws):
        state = torch.nn.functional.dropout(batch.state, 0.5, self.training)
        return super().forward(batch.replace(state=state), draws)


class SlowValidation(FlowPolicy):
    """A validation batch takes a fifth of a second more, time to send a signal into the pass: only where the
    environment has SLOW_VALIDATION, since the run that resumes with the same configuration needs no such time."""

    def forward(self, batch, draws):
        if not self.training and "SLOW_VALIDATION" in os.environ:
            time.sleep(0.2)
        return super().forward(batch, draws)


class BrokenValidation(FlowPolicy):
    """On rank BROKEN_RANK a validation raises, where the environment names it."""

    def forward(self, batch, draws):
        if not self.training and os.environ.get("BROKEN_RANK") == str(RANK):
            raise ZeroDivisionError("division by a broken part")
        return super().forward(batch, draws)


class HangingSource(LeRobotSource):
    """On rank 1 the seventh read of a worker never ends."""

    def open(self, name, settings):
        return HangingDataset(**vars(super().open(name, settings)))


class HangingDataset(LeRobotDataset):
    def cursors(self, window):
        factory, reads = super().cursors(window), [0]
        make = factory.cursor

        def cursor():
            made = make()
            read = made.read

            def hang(*address):
                reads[0] += 1
                while RANK == 1 and reads[0] >= 7:
                    time.sleep(0.1)
                return read(*address)

            made.read = hang
            return made

        factory.cursor = cursor
        return factory
