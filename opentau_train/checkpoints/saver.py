"""Writes checkpoints, at once or while training goes on: all ranks write, all acknowledge, rank 0 commits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from opentau_train.checkpoints import commit
from opentau_train.checkpoints.contents import VERSION, ambient_random_state, read_weights, tensors_of
from opentau_train.checkpoints.pretrained import FOLDER, Pretrained, write_folder
from opentau_train.config.settings import CheckpointSettings
from opentau_train.distributed.world import World
from opentau_train.errors import Fault
from opentau_train.step import TrainState


@dataclass(frozen=True)
class _Content:
    """A checkpoint in memory: this rank's parts. `sharded`: the policy's own are not the whole of it."""

    tensors: dict[str, Any] = field(repr=False)
    sharded: bool
    rng: dict[str, Any] = field(repr=False)
    run: dict[str, Any]


class Saver:
    """Writes the checkpoints of one run. As a context manager it ends what is under way.

    With `checkpoint.async` a save copies the state to memory, returns, and a thread writes it; `poll` at the step
    boundaries commits it once all ranks have written. One save is under way at a time. Every method is collective.
    """

    def __init__(self, run_dir: Path, world: World, settings: CheckpointSettings, card: Pretrained):
        self.folder = run_dir / "checkpoints"
        self.world, self.settings, self.card = world, settings, card
        self._pending: tuple[Path, commit.Retention, Future] | None = None
        if settings.asynchronous:
            self._group = world.background_group()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            on_cuda = world.device.type == "cuda"
            # Its buffers stay, so that only the first copy pays for fresh memory.
            self._stager = DefaultStager(StagingOptions(on_cuda, False, False, on_cuda))

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """After an error other ranks may be gone: no collective, but what they all have written isn't given up."""
        if self._pending is not None:
            partial, retention, written = self._pending
            wait([written])
            if written.exception() is None and self.world.is_main:
                commit.sweep(commit.publish(partial, retention))
            self._pending = None
        if self.settings.asynchronous:
            self._thread.shutdown()
            self._stager.close()

    def save(self, state: TrainState, *, stream: dict[str, Any], counters: dict[str, int]) -> Path | None:
        """Write the checkpoint of `state.step`. Returns its path once it is the last one, None while it is written.

        Raises `Fault` on all ranks when any of them couldn't write; the checkpoints before stay as they were.
        """
        self.finish()
        partial = self.folder / f"{state.step:08d}{commit.PARTIAL}"
        retention = commit.Retention(self.settings.keep_last, self.settings.keep_every)
        self._together(partial, lambda: _prepare(partial), main_only=True)
        content = self._content(state, stream, counters)
        if self.settings.asynchronous:
            self._pending = partial, retention, self._thread.submit(self._write, partial, content, self._group)
            return None
        self._write(partial, content, None)
        return self._publish(partial, retention)

    @property
    def written(self) -> bool:
        """Whether this rank has written, or failed to write, its part of the save that is under way."""
        return self._pending is not None and self._pending[2].done()

    def poll(self, all_written: bool) -> Path | None:
        """At a step boundary: commit what every rank has finished writing and return its path, else None.

        `all_written`: `written` on every rank, as the step's own all-reduce found it; one more a step would cost more
        than the commit. Raises `Fault` on all ranks when any of them couldn't write.
        """
        return self.finish() if all_written else None

    def finish(self) -> Path | None:
        """Wait for the save that is under way, if any, and commit it. Raises as `poll` does."""
        if self._pending is None:
            return None
        (partial, retention, written), self._pending = self._pending, None
        written.result()
        return self._publish(partial, retention)

    def _content(self, state: TrainState, stream: dict[str, Any], counters: dict[str, int]) -> _Content:
        tensors = tensors_of(state)
        if self.settings.asynchronous:
            tensors = cast(dict[str, Any], self._stager.stage(tensors))  # it copies before it returns
        run = {"version": VERSION, "step": state.step, "counters": dict(counters), "stream": stream}
        return _Content(tensors, state.replicas.sharded, ambient_random_state(), run)

    def _write(self, partial: Path, content: _Content, group: dist.ProcessGroup | None) -> None:
        def shards() -> None:
            alone = self.world.size == 1
            dcp.save(content.tensors, checkpoint_id=partial / "state", process_group=group, no_dist=alone)

        def own() -> None:
            torch.save(content.rng, partial / "rng" / f"{self.world.rank}.pt")
            if self.world.is_main:
                (partial / "run.json").write_text(json.dumps(content.run, indent=1) + "\n")
                # From the files just written: to gather the shards would be a collective that training waits for.
                weights = read_weights(partial) if content.sharded else content.tensors["model"]
                write_folder(partial / FOLDER, weights, self.card)

        self._together(partial, shards, group)
        self._together(partial, own, group)
        self._together(partial, lambda: commit.seal(partial), group, main_only=True)

    def _publish(self, partial: Path, retention: commit.Retention) -> Path:
        leftovers: list[Path] = []
        self._together(partial, lambda: leftovers.extend(commit.publish(partial, retention)), main_only=True)
        if self.settings.asynchronous:
            self._thread.submit(commit.sweep, leftovers)
        else:
            commit.sweep(leftovers)
        return partial.with_suffix("")

    def _together(
        self,
        partial: Path,
        work: Callable[[], object],
        group: dist.ProcessGroup | None = None,
        main_only: bool = False,
    ) -> None:
        """`work()` on the ranks; where it failed on any, the unfinished directory goes and all ranks raise."""
        problem = None
        try:
            if self.world.is_main or not main_only:
                work()
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = f"rank {self.world.rank}: {_root_cause(error)}"
        problems = [p for p in self.world.gather(problem, group) if p]
        if problems:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise _cannot_save(partial, problems[0])


def _cannot_save(partial: Path, problem: str) -> Fault:
    last = partial.with_name("last")
    good = f"the last good checkpoint is {last.resolve()}" if last.exists() else "there is no earlier checkpoint"
    free = shutil.disk_usage(partial.parent).free if partial.parent.is_dir() else 0
    return Fault(
        f"can't save {partial.with_suffix('')}: {problem}; {good}",
        where=f"{partial.parent}, with {free / 1e6:,.0f} MB free",
        remedy="make room or raise the quota, then go on with the same command and resume=auto",
    )


def _prepare(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("rng", FOLDER):
        (partial / name).mkdir(parents=True)


def _root_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        inner = next(iter(error.failures.values()))
        return str(inner[0] if isinstance(inner, tuple) else inner)
    return str(error) or type(error).__name__
