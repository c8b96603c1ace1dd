"""What the training loop costs: the program's against one written by hand, on the same batches and the same policy.

    python benchmarks/loop.py [--steps 60] [--batch 8] [--models flow_tiny flow_small] [--device cuda]

The built-in DROID sample (two control modes, three cameras), read by one worker, on one thread. *By hand* is the
shortest step that trains: forward, loss, backward, clipping, fused AdamW, a learning rate from a schedule; no votes of
ranks, no counts of the global batch, no keyed randomness, no check of the gradient. It is taken on every batch right
after the program's own step, or before it in every second one, by a twin of the policy, so that both meet the same
noise of the machine. *Beside* is all that the program does between two steps (data's arrival, votes, rows of numbers,
progress), of which *arrival* is what taking the same batches from the same loader costs by itself. The last ratio is
the whole loop's: (step + beside) over (by hand + arrival). Milliseconds of the main process's CPU time (on a card by
the clock, waited for), medians (means); the first steps are left out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support.program import machine, settings_of

from opentau_train import cli, composing, loop
from opentau_train.data.batch import Batch
from opentau_train.data.load.stream import training_batches
from opentau_train.data.mixture.open import open_mixture
from opentau_train.models.draws import Draws
from opentau_train.models.policy import Policy
from opentau_train.step import StepSetup, StepTaken, TrainState

LEFT_OUT = 4
"""Steps at the beginning."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="that are measured (60)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=["flow_tiny", "flow_small"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; {options.steps} steps of each; ms\n")
    print("| policy | batch | step | by hand | step / by hand | beside | arrival | host work | loop / by hand |")
    print("|---|---|---|---|---|---|---|---|---|")
    steps, models = (2, options.models[:1]) if options.quick else (options.steps, options.models)
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            print(row(Path(folder) / model, model, options.batch, steps, options.device), flush=True)


def row(folder: Path, model: str, batch: int, steps: int, device: str) -> str:
    """A line of the table."""
    arguments = [
        *("+recipe=droid_policy", f"model={model}", f"trainer.global_batch_size={batch}", f"trainer.device={device}"),
        *(f"trainer.steps={LEFT_OUT + steps + 1}", "scheduler.warmup_steps=2", "data.num_workers=1"),
        *("validation=none", "checkpoint.every=0", f"paths.run_dir={folder}"),
    ]
    pair, tree = Pair(device), composing.compose(arguments)
    with mock.patch.object(loop, "train_step", pair.step):
        assert loop.run(cli.checked(tree), tree) == 0
    step, by_hand, beside = (found[LEFT_OUT:] for found in (pair.program, pair.by_hand, pair.beside))
    arrival = arrivals(arguments, folder)
    cells = [f"{statistics.median(found):.2f} ({statistics.mean(found):.2f})" for found in (step, by_hand)]
    ratio = statistics.median(a / b for a, b in zip(step, by_hand, strict=True))
    host = statistics.mean(beside) - arrival
    whole = ratio + host / (statistics.median(by_hand) + arrival)
    cells += [f"{ratio:.3f}", f"{statistics.median(beside):.2f} ({statistics.mean(beside):.2f})"]
    return f"| {model} | {batch} | {' | '.join(cells)} | {arrival:.2f} | {host:+.2f} | {whole:.3f} |"


class Pair:
    """The program's step and the one by hand on every batch, in turns; milliseconds of each."""

    def __init__(self, device: str):
        self.device, self.twin = device, None
        self.program: list[float] = []
        self.by_hand: list[float] = []
        self.beside: list[float] = []
        self._real, self._ended = loop.train_step, 0.0

    def step(
        self, state: TrainState, batch: Batch, counts: Mapping[str, float], lr: float, setup: StepSetup, most: int
    ) -> StepTaken:
        """In place of `train_step`."""
        if self._ended:
            self.beside.append(1e3 * (self._now() - self._ended))
        self.twin = self.twin or Twin(state.policy, setup.grad_clip)
        taken: list[StepTaken] = []
        calls: list[tuple[list[float], Callable[[], Any]]] = [
            (self.program, lambda: taken.append(self._real(state, batch, counts, lr, setup, most))),
            (self.by_hand, lambda: self.twin.step(batch)),
        ]
        for found, call in calls[:: -1 if len(self.program) % 2 else 1]:
            started = self._now()
            call()
            found.append(1e3 * (self._now() - started))
        self._ended = self._now()
        return taken[0]

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class Twin:
    """The same policy, trained by the shortest step."""

    def __init__(self, policy: Policy, grad_clip: float | None):
        self.policy, self.grad_clip = copy.deepcopy(policy), grad_clip or float("inf")
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=3e-4, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 2))

    def step(self, batch: Batch) -> None:
        terms = self.policy(batch, Draws(batch.key))
        weights = self.policy.loss_weights
        loss = sum(weight * terms[k][0].sum() / terms[k][1].sum() for k, weight in weights.items())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.grad_clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def arrivals(arguments: list[str], folder: Path) -> float:
    """CPU milliseconds of the main process to take a batch from the same loader and do nothing with it."""
    settings = settings_of(arguments)
    mixture, steps = open_mixture(settings), settings.trainer.steps
    tape = mixture.tape(settings.trainer.global_batch_size)
    quarantine = folder / "quarantine.jsonl"
    parts = training_batches(mixture, tape, rank=0, size=1, first_step=0, last_step=steps, quarantine=quarantine)
    with closing(parts):
        for _ in range(LEFT_OUT):
            next(parts)
        started = time.process_time()
        for _ in range(steps - LEFT_OUT):
            next(parts)
        return 1e3 * (time.process_time() - started) / (steps - LEFT_OUT)


if __name__ == "__main__":
    main()
