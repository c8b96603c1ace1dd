"""Writes checkpoints, at once or while training goes on: all ranks write, all acknowledge, rank 0 commits."""

from __future__ import annotations

import logging
import shutil
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from opentau_train.checkpoints import commit, manifest
from opentau_train.checkpoints.card import FOLDER, Pretrained, write_folder
from opentau_train.checkpoints.contents import RUN, VERSION, as_json, read_weights, tensors_of
from opentau_train.config.settings import CheckpointSettings
from opentau_train.distributed.world import World
from opentau_train.errors import Fault
from opentau_train.step import TrainState
from opentau_train.threads import in_background

log = logging.getLogger(__name__)

T = TypeVar("T")

THREAD = "checkpoint"
"""The name of the threads that write in the background."""


@dataclass(frozen=True)
class _Content:
    """A checkpoint in memory: this rank's parts. `sharded`: the policy's own are not the whole of it."""

    tensors: dict[str, Any] = field(repr=False)
    sharded: bool
    run: dict[str, Any]


class _UnderWay(NamedTuple):
    """A save of which this rank's part is being written, or has been."""

    partial: Path
    written: Future[None]


class Saver:
    """Writes the checkpoints of one run. As a context manager it ends what is under way.

    With `checkpoint.async` a save copies the state to memory, returns, and a thread writes it; `poll` at the step
    boundaries commits it once all ranks have written. One save is under way at a time. Every method is collective, and
    waits no longer than `world.timeout`.
    """

    def __init__(
        self, run_dir: Path, world: World, settings: CheckpointSettings, card: Pretrained, num_bytes: int | None = None
    ):
        self.folder = run_dir / "checkpoints"
        self.world, self.settings, self.card, self.num_bytes = world, settings, card, num_bytes
        self.retention = commit.Retention(settings.keep_last, settings.keep_every)
        self.run: dict[str, Any] = {}
        self._under_way: _UnderWay | None = None
        self._sweeping: Future[None] | None = None
        if settings.asynchronous:
            self._group = world.background_group()
            on_cuda = world.device.type == "cuda"
            # Its buffers stay, so that only the first copy pays for fresh memory.
            options = StagingOptions(
                use_pinned_memory=on_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_cuda,
            )
            self._stager = DefaultStager(options)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """After an error other ranks may be gone: no collective, but what they all have written isn't given up."""
        if self._under_way is not None:
            (partial, written), self._under_way = self._under_way, None
            if self._is_done(written) and written.exception() is None and self.world.is_main:
                with suppress(OSError) if error is not None else nullcontext():  # `error` is what is told
                    commit.sweep(commit.publish(partial, self.retention))
        if self._sweeping is not None:
            self._is_done(self._sweeping)
        if self.settings.asynchronous:
            self._stager.close()

    def save(
        self, state: TrainState, *, stream: dict[str, Any], counters: dict[str, int], at_once: bool = False
    ) -> Path | None:
        """Write the checkpoint of `state.step`. Returns its path once it is the last one, None while it is written and
        where it was there already: a run that goes on from its newest checkpoint, or is stopped right after a save,
        has nothing new but maybe counters. `at_once`: not in the background, since nothing comes after it.

        Raises `Fault` on all ranks when any of them couldn't write; the checkpoints before stay as they were.
        """
        self.finish()
        partial = self.folder / f"{state.step:08d}{commit.PARTIAL}"
        self.run = run = {"version": VERSION, "step": state.step, "counters": dict(counters), "stream": stream}
        if self._together(partial, lambda: self._is_there(run)):
            return None
        if self._sweeping is not None:
            self._is_done(self._sweeping)  # it may be deleting what a kill left under this very name
        self._together(partial, lambda: _prepare(partial))
        in_place = at_once or not self.settings.asynchronous
        content = self._content(state, run, in_place)
        if not in_place:
            self._under_way = _UnderWay(
                partial, in_background(lambda: self._write(partial, content, self._group), THREAD)
            )
            return None
        self._write(partial, content, None)
        return self._publish(partial)

    @property
    def step(self) -> int | None:
        """The step that was saved last, that is being saved, or that the run was resumed from."""
        return self.run.get("step")

    def recount(self, step: int, counters: dict[str, int]) -> None:
        """Bring the counters of the step's checkpoint up to date, if it is that of `self.step`: now, or when it is
        committed. Raises as `save`."""
        if step != self.step:
            return
        self.run["counters"] = dict(counters)
        if self._under_way is None:
            self._together(self.folder / f"{step:08d}{commit.PARTIAL}", lambda: self._is_there(self.run))

    @property
    def written(self) -> bool:
        """Whether this rank has written, or failed to write, its part of the save that is under way."""
        return self._under_way is not None and self._under_way.written.done()

    def poll(self, all_written: bool) -> Path | None:
        """At a step boundary: commit what every rank has finished writing and return its path, else None.

        `all_written`: whether `written` holds on every rank, from the vote before the step (`Agreement.all_written`); a
        collective of its own would cost more than the commit. Raises `Fault` on all ranks when any of them couldn't
        write.
        """
        return self.finish() if all_written else None

    def finish(self) -> Path | None:
        """Wait for the save that is under way, if any, and commit it. Raises as `poll` does, and where it hangs."""
        if self._under_way is None:
            return None
        (partial, written), self._under_way = self._under_way, None
        if not self._is_done(written):
            raise self._cannot_save(partial, f"rank {self.world.rank}: its part is still not written")
        written.result()
        return self._publish(partial)

    def _is_there(self, run: dict[str, Any]) -> bool:
        """Whether the step is a whole checkpoint, after bringing its `run.json` up to date. No two histories of a run
        share a directory (`commit.resolve`), so its weights are those of now."""
        checkpoint = self.folder / f"{run['step']:08d}"
        if commit.flaw(checkpoint) is not None:
            return False
        _bring_up_to_date(checkpoint, run)
        return True

    def _is_done(self, call: Future[None]) -> bool:
        """Whether `call` ends in time; one that doesn't is left behind. The watchdog, which shows where it is, comes
        before."""
        timeout = self.world.timeout
        limit = None if timeout is None else timeout.total_seconds()
        done = bool(wait([call], limit).done)
        if not done:
            log.warning("%s: the storage has not answered for %g s", self.folder, limit)
        return done

    def _content(self, state: TrainState, run: dict[str, Any], in_place: bool) -> _Content:
        tensors = tensors_of(state)
        if not in_place:
            tensors = cast(dict[str, Any], self._stager.stage(tensors))  # it copies before it returns
        return _Content(tensors, state.replicas.sharded, run)

    def _write(self, partial: Path, content: _Content, group: dist.ProcessGroup | None) -> None:
        def shards() -> dict[str, manifest.File]:
            own, alone = f"state/__{self.world.rank}_*", self.world.size == 1
            writer = dcp.FileSystemWriter(partial / "state", sync_files=False)  # `flushing` and `describe` do
            with manifest.flushing(partial, own, f"{FOLDER}/*"):
                if self.world.is_main and not content.sharded:
                    write_folder(partial / FOLDER, content.tensors["model"], self.card)
                dcp.save(content.tensors, storage_writer=writer, process_group=group, no_dist=alone)
            # Each rank's own, which its node has in memory still: another one would read them over the network.
            return manifest.describe(partial, partial.glob(own))

        def readable() -> None:
            (partial / RUN).write_text(as_json(content.run))
            if content.sharded:
                # From the files just written: to gather the shards would be a collective that training waits for.
                write_folder(partial / FOLDER, read_weights(partial), self.card)
            commit.seal(partial, dict(ChainMap(*described)))

        described = self._each(partial, shards, group)
        self._together(partial, readable, group)

    def _publish(self, partial: Path) -> Path:
        def commit_it() -> list[Path]:
            _bring_up_to_date(partial, self.run)
            return commit.publish(partial, self.retention)

        leftovers = self._together(partial, commit_it)
        if self.world.is_main:
            self._sweeping = in_background(lambda: commit.sweep(leftovers), THREAD)
        return partial.with_suffix("")

    def _together(self, partial: Path, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Make `work()` on rank 0 and return what it returned, on all ranks; see `_each`."""
        return cast(T, self._each(partial, lambda: work() if self.world.is_main else None, group)[0])

    def _each(self, partial: Path, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """Make `work()` on every rank and return what it returned on each. Where it failed on any, the unfinished
        directory goes and all ranks raise."""
        problem, result = None, None
        try:
            result = work()
        except (Exception, CheckpointException) as error:
            # Broad, and not to be split: DCP's is no Exception, and gathers any kind of the other ranks'. Whatever
            # it is, the other ranks wait for this one's answer below.
            problem = f"rank {self.world.rank}: {_root_cause(error)}{_room(partial)}"
        answers = self.world.gather((problem, result), group)
        problems = [p for p, _ in answers if p]
        if problems:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise self._cannot_save(partial, problems[0])
        return [cast(T, result) for _, result in answers]

    def _cannot_save(self, partial: Path, problem: str) -> Fault:
        needed = "" if self.num_bytes is None else f"; a checkpoint takes {_in_mb(self.num_bytes)}"
        return Fault(
            f"can't save {partial.with_suffix('')}: {problem}{needed}",
            where=f"{partial.parent}; {commit.last_good(self.folder)}",
            remedy="make room or raise the quota, then go on with the same command and resume=auto",
        )


def _room(partial: Path) -> str:
    """What was written and what was left, at the failure: the unfinished directory goes afterwards."""
    if not partial.is_dir():
        return ""
    written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    return f" ({_in_mb(written)} written, {_in_mb(shutil.disk_usage(partial).free)} free)"


def _in_mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.3g} MB" if num_bytes < 1e7 else f"{num_bytes / 1e6:,.0f} MB"


def _prepare(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / FOLDER).mkdir(parents=True)


def _bring_up_to_date(checkpoint: Path, run: dict[str, Any]) -> None:
    """Let its `run.json` say `run`."""
    if (checkpoint / RUN).read_text() != as_json(run):
        commit.amend(checkpoint, RUN, as_json(run))


def _root_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        inner = next(iter(error.failures.values()))
        return _root_cause(inner[0] if isinstance(inner, tuple) else inner)
    if "unexpected pos" in str(error):  # all that torch.save says where the system took less than it was given
        return "a write was cut short, as it is on a full disk"
    # What safetensors puts before the system's own words reads as a second error.
    return str(error).rpartition("I/O error: ")[2] or type(error).__name__
