"""The way of a run, top to bottom: prepare the job (`job.py`), then

    next batch, step, maybe log, maybe validate, maybe save, stop?

`run` is called by the command line on every rank.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from opentau_train.config.settings import Settings
from opentau_train.data.load.stream import training_batches
from opentau_train.data.order.state import save_state
from opentau_train.distributed.preflight import identity
from opentau_train.distributed.stopping import StopFlag, Stopped, mark_preempted, stop_signals
from opentau_train.distributed.watchdog import watch
from opentau_train.distributed.world import launch
from opentau_train.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED
from opentau_train.job import Job, prepare
from opentau_train.log import log_to
from opentau_train.metrics.meter import Meter
from opentau_train.metrics.recorder import FlightRecorder
from opentau_train.sinks.base import SinkContext, Sinks, open_sinks
from opentau_train.step import StepResult, check_health, train_step
from opentau_train.threads import InterruptibleIterator
from opentau_train.validation.plots import save_png

log = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
STOP_CODES = {0: EXIT_OK, 1: EXIT_PREEMPTED, 2: EXIT_INTERRUPTED}


def run(settings: Settings, tree: dict[str, Any]) -> int:
    """Train as `settings` say; `tree` is the same configuration as plain data, for the record. Returns the exit code.

    Raises `UserError` for mistakes in configuration or data, on all ranks alike.
    """
    trainer = settings.trainer
    torch.use_deterministic_algorithms(trainer.deterministic)
    with ExitStack() as stack:
        entered = launch(
            device=trainer.device,
            precision=trainer.precision,
            timeout=trainer.step_timeout,
            identity=identity(tree),
        )
        world = stack.enter_context(entered)
        console = stack.enter_context(log_to(sys.stderr, world.is_main))
        stop = stack.enter_context(stop_signals())
        with world.roll_call():
            job = prepare(settings, tree, world)
        stop.watch(job.run_dir, clear=world.is_main)
        console.also_to(job.run_dir / "train.log")
        if job.state.step >= trainer.steps and not job.owes_validation:
            log.info("nothing left to train: %s is at step %d of %d", job.run_dir, job.state.step, trainer.steps)
            return EXIT_OK
        sinks = stack.enter_context(_open_sinks(job, tree))
        stack.enter_context(closing(job.validation))
        stack.enter_context(job.saver)
        recorder = FlightRecorder(job.run_dir, job.tape, job.mixture, world) if settings.flight_recorder else None
        stack.enter_context(nullcontext() if recorder is None else recorder)
        watchdog = watch(job.place, job.run_dir, rank=world.rank, size=world.size, timeout=trainer.step_timeout)
        with watchdog, world.roll_call():
            code = _loop(job, sinks, recorder, stop)
        if world.is_main:
            if code == 1:
                mark_preempted(job.run_dir, job.state.step)
            log.info(next_steps(job.run_dir, job.state.step, code, job.counters["bad"]))
        return STOP_CODES[code]


def _loop(job: Job, sinks: Sinks, recorder: FlightRecorder | None, stop: StopFlag) -> int:
    """Train until the last step or a stop; returns the stop code that all ranks agreed on."""
    settings, trainer, state, world = job.settings, job.settings.trainer, job.state, job.world
    batches = training_batches(
        job.mixture,
        job.tape,
        rank=world.rank,
        size=world.size,
        first_step=state.step,
        last_step=trainer.steps,
        quarantine=job.run_dir / QUARANTINE,
    )
    code = _validate(job, sinks, stop) if job.owes_validation else 0
    _point_to_best(job)  # an owed validation may have found the resumed checkpoint to be it
    stop_at = state.step + (trainer.stop_after or trainer.steps)
    meter = Meter(job.mixture, job.tape, state, world)
    with closing(InterruptibleIterator(batches)) as parts:
        while state.step < trainer.steps and code == 0:
            job.place.enter("data wait", state.step + 1)
            with meter.waiting():
                part = parts.next(stop.poll)
            asked = max(stop.poll(), int(state.step + 1 == stop_at < trainer.steps))
            if part is not None:
                meter.open_decoders = part.open_decoders
            lr = settings.optimizer.lr * job.schedule(state.step, trainer.steps)
            result = train_step(
                state,
                part,
                world,
                trainer,
                lr=lr,
                max_samples=job.max_samples,
                stop=asked,
                place=job.place,
                written=job.saver.written,
            )
            code = result.stop
            if result.taken:
                if recorder is not None and part is not None and part.batch is not None:
                    recorder.write(state, part.batch, result)
                _account(job, meter, sinks, result)
            _report_save(job, job.saver.poll(result.written))
            if job.owes_validation and not code:
                with meter.paused():
                    code = _validate(job, sinks, stop)
            if code or state.step == trainer.steps or job.is_best or _due(settings.checkpoint.every, state.step):
                with meter.paused():
                    _save(job, sinks)
    _report_save(job, job.saver.finish())
    return code


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _account(job: Job, meter: Meter, sinks: Sinks, result: StepResult) -> None:
    """What a step that was taken leaves behind: counters, and a row of numbers now and then."""
    job.place.enter("log")
    meter.add(result)
    _check(job, result)
    trainer, step = job.settings.trainer, job.state.step
    if _due(trainer.log_every, step) or step == trainer.steps or result.stop:
        sinks.write(step, meter.row(result, job.counters["bad"]))


def _check(job: Job, result: StepResult) -> None:
    before = job.counters["bad"]
    job.counters["bad"] += result.num_substituted
    if job.counters["bad"].bit_length() > before.bit_length():  # the first, then at each doubling
        said = "step %d: %d windows so far can't be read and were replaced by others: %s"
        log.warning(said, job.state.step, job.counters["bad"], job.run_dir / QUARANTINE)
    job.counters["skipped"] = job.state.skipped
    limits = job.settings.data.bad_samples
    seen = job.state.step * job.settings.trainer.global_batch_size
    check_health(job.state, job.settings.trainer, job.counters["bad"], seen, limits.max_fraction, limits.grace)


def _validate(job: Job, sinks: Sinks, stop: StopFlag) -> int:
    """The passes and their row; the stop code when they were left unfinished, which leaves no row."""
    started, state, step = time.perf_counter(), job.state, job.state.step
    try:
        measured = job.validation.run(state.policy, state.replicas, state.ema, stop, job.place)
    except Stopped as stopped:
        return stopped.code
    job.counters["validated"] = step
    sinks.write(step, {**measured.row, "Timing/ValidationSeconds": time.perf_counter() - started})
    if job.world.is_main:
        for picture in measured.pictures:
            save_png(job.run_dir / "plots" / f"{picture.file}_{step:08d}.png", picture.pixels)
            sinks.image(step, picture.tag, picture.pixels)
    if job.best is not None and measured.scores is not None:
        job.best.update(job.world, step, measured.scores)
    return 0


def _save(job: Job, sinks: Sinks) -> None:
    job.place.enter("save")
    sinks.flush()
    stream = save_state(job.tape, job.state.step)
    # The one before first, so that `best` holds it where it is to stay before the next one retires what nothing names.
    _report_save(job, job.saver.finish())
    _report_save(job, job.saver.save(job.state, stream=stream, counters=job.counters))


def _report_save(job: Job, path: Path | None) -> None:
    if path is not None and job.world.is_main:
        log.info("saved %s", path)
        _point_to_best(job)


def _point_to_best(job: Job) -> None:
    if job.best is not None and job.world.is_main:
        job.best.point()


def _open_sinks(job: Job, tree: dict[str, Any]) -> Sinks:
    """Rank 0 writes; the other ranks have no sink. Raises `UserError` on all ranks where one can't be opened."""
    context = SinkContext(
        run_dir=job.run_dir,
        run_name=job.run_dir.name,
        total_steps=job.settings.trainer.steps,
        start_step=job.state.step,
        config=tree,
    )
    return job.world.agree(lambda: open_sinks(job.settings.logger, context) if job.world.is_main else Sinks([]))


def next_steps(run_dir: Path, step: int, stop: int, num_bad: int) -> str:
    """The last words: where everything is and what to look at. `num_bad`: windows that were replaced."""
    said = {0: f"finished at step {step}", 1: f"preempted at step {step}", 2: f"interrupted at step {step}"}[stop]
    lines = [f"{said}. Run directory: {run_dir}"]
    if (run_dir / "tensorboard").is_dir():
        lines.append(f"  curves:      tensorboard --logdir {run_dir}/tensorboard")
    lines.append(f"  numbers:     {run_dir}/metrics.jsonl")
    lines.append(f"  checkpoint:  {run_dir}/checkpoints/last (weights in pretrained_model/)")
    if num_bad:
        lines.append(f"  unreadable:  {num_bad} windows were replaced by others, see {run_dir}/quarantine.jsonl")
    if stop:
        lines.append(f"  go on with:  the same command and resume=auto paths.run_dir={run_dir}")
    return "\n".join(lines)
