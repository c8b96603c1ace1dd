"""The way of a run, top to bottom: prepare the job (`job.py`), then

    next batch, step, maybe log, maybe validate, maybe save, stop?

`run` is called by the command line on every rank.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from opentau_train.checkpoints import commit
from opentau_train.checkpoints.lock import RunDirLost
from opentau_train.checkpoints.place import held
from opentau_train.checkpoints.rescue import rescue
from opentau_train.config.settings import Settings
from opentau_train.data.load.arrival import Arrival, arrivals
from opentau_train.data.load.stream import last_remedy, training_batches
from opentau_train.data.order.state import save_state
from opentau_train.distributed.consensus import Agreement, Ballot, Vote
from opentau_train.distributed.network import watch_connections
from opentau_train.distributed.numerics import set_numerics
from opentau_train.distributed.performance import scheduled_collection, traced
from opentau_train.distributed.preflight import identity
from opentau_train.distributed.stopping import Stop, StopFlag, Stopped, mark_preempted, stop_signals
from opentau_train.distributed.watchdog import Progress, watch
from opentau_train.distributed.world import launch
from opentau_train.errors import EXIT_OK, Fault
from opentau_train.job import Job, prepare
from opentau_train.log import log_to
from opentau_train.metrics.meter import Meter
from opentau_train.metrics.recorder import FlightRecorder
from opentau_train.models.packing.cut import size_of
from opentau_train.sinks.base import Sink, Sinks
from opentau_train.sinks.opening import begun, context_of, open_sinks
from opentau_train.sinks.reading import Reading
from opentau_train.sinks.summary import next_steps
from opentau_train.step import StepSetup, check_skipped, check_windows, train_step
from opentau_train.threads import InterruptibleIterator, first_line
from opentau_train.validation.changes import changes

log = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
TRACE = "profile/trace.json"


def run(settings: Settings, tree: dict[str, Any]) -> int:
    """Train as `settings` say; `tree` is the same configuration as plain data, for the record. Returns the exit code.

    Raises `UserError` for mistakes in configuration or data, on all ranks alike.
    """
    trainer = settings.trainer
    set_numerics(deterministic=trainer.deterministic, matmul_precision=trainer.matmul_precision)
    with ExitStack() as watched, ExitStack() as stack:
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
            place, progress = stack.enter_context(held(settings, world)), Progress()
            # Its end comes last: a saver, a tracker or the ranks' last barrier may hang too.
            watched.enter_context(
                watch(progress, place.run_dir, rank=world.rank, size=world.size, timeout=trainer.step_timeout)
            )
            told = context_of(settings, tree, place.run_dir, place.step)
            trackers = stack.enter_context(begun(settings, told, world.is_main, world.agree))
            with closing(Reading(world.is_main)) as progress.shown:
                job = prepare(settings, tree, world, place, progress)
        stop.watch(job.run_dir, clear=world.is_main)
        world.agree(lambda: console.also_to(job.run_dir / "train.log"))
        job.checks += [job.place.check, console.check]
        if job.state.step >= trainer.steps and not job.owes_validation:
            log.info("nothing left to train: %s is at step %d of %d", job.run_dir, job.state.step, trainer.steps)
            return EXIT_OK
        sinks = stack.enter_context(_open_sinks(job, tree, trackers))
        job.progress.shown = sinks.stage
        stack.enter_context(closing(job.validation))
        stack.push(partial(_name_last_good, job))
        stack.enter_context(job.saver)
        recorder = FlightRecorder(job.run_dir, job.tape, job.mixture, world) if settings.flight_recorder else None
        stack.enter_context(nullcontext() if recorder is None else recorder)
        stack.push(partial(_enter_closing, job))
        watch_connections()  # those of all groups: the mesh's, the saver's
        with world.roll_call():
            try:
                stopped = _loop(job, sinks, recorder, stop)
            except RunDirLost as lost:  # on all ranks alike
                stream = save_state(job.tape, job.state.step)
                raise rescue(lost, job.place, job.saver, job.state, stream=stream, counters=job.counters) from lost
        if world.is_main:
            if stopped is Stop.PREEMPTED:
                mark_preempted(job.run_dir, job.state.step)
            how = "finished" if stopped is Stop.NONE else stopped.name.lower()
            log.info(next_steps(job.run_dir, f"{how} at step {job.state.step}", job.counters["bad"], bool(stopped)))
        return stopped.exit_code


def _enter_closing(job: Job, kind: type | None, error: BaseException | None, trace: object) -> None:
    """Record that the run closes, and after which error: the watchdog reports it where closing hangs."""
    job.progress.enter("closing" if error is None else f"closing after {type(error).__name__}: {first_line(error)}")


def _name_last_good(job: Job, kind: type | None, error: BaseException | None, trace: object) -> None:
    if error is not None and job.world.is_main:
        log.info("%s", commit.last_good(job.saver.folder))


def _loop(job: Job, sinks: Sinks, recorder: FlightRecorder | None, stop: StopFlag) -> Stop:
    """Train until the last step or a stop; returns the stop that all ranks agreed on."""
    state, world, last_step = job.state, job.world, job.settings.trainer.steps
    stopped = _validate(job, sinks, stop) if job.owes_validation else Stop.NONE
    _point_links(job)  # an owed validation may have found the resumed checkpoint to be it
    stop_at = state.step + (job.settings.trainer.stop_after or last_step)
    setup = job.step_setup()
    meter = Meter(job.mixture, job.tape, state, world, setup.flops)
    trace = traced(job.run_dir / TRACE, job.settings.trainer.profile_steps if world.is_main else 0)
    with scheduled_collection() as collect, trace as traced_step, closing(_incoming(job)) as incoming:
        while state.step < last_step and stopped is Stop.NONE:
            job.progress.enter("data wait", state.step + 1)
            with meter.waiting():
                arrival = incoming.next(stop.poll)
            asked = Stop.PREEMPTED if state.step + 1 == stop_at < last_step else Stop.NONE
            ballot = Ballot(_vote(job, arrival, max(stop.poll(), asked), setup), world)
            job.progress.enter("vote of the ranks")
            agreement = ballot.result()
            stopped = agreement.stop
            if agreement.take_step:
                assert arrival is not None and arrival.part.batch is not None, "a vote without a batch takes no step"
                taken = train_step(
                    state, arrival.on_device(), agreement.counts, job.lr, setup, agreement.num_micro_batches
                )
                if recorder is not None:
                    recorder.write(state, arrival.part.batch, taken)
                meter.open_decoders = arrival.part.open_decoders
                meter.add(taken, agreement.num_tokens)
                sinks.advance(state.step)
                _account(job, meter, sinks, agreement)
                traced_step()
                collect(state.step)
            _report_save(job, partial(job.saver.poll, agreement.all_written))
            if job.must_save(stopped):
                with meter.saving():
                    _save(job, sinks, at_once=stopped is not Stop.NONE)
            if job.owes_validation and stopped is Stop.NONE:
                with meter.paused():
                    stopped = _validate(job, sinks, stop)
                if job.must_save_validated(stopped):
                    with meter.saving():
                        _save(job, sinks, at_once=stopped is not Stop.NONE)
    _report_save(job, job.saver.finish)
    job.world.agree(job.raise_trouble)
    return stopped


def _incoming(job: Job) -> InterruptibleIterator[Arrival]:
    """This rank's part of every global batch from the state's step on, each on its way to the device.

    With loader workers one step ahead: without, this process reads the files itself, and only while nothing else does.
    """
    parts = training_batches(
        job.mixture,
        job.tape,
        rank=job.world.data_rank,
        size=job.world.data_size,
        first_step=job.state.step,
        last_step=job.settings.trainer.steps,
        quarantine=job.run_dir / QUARANTINE,
    )
    ahead, cap = job.settings.data.num_workers > 0, job.settings.data.max_num_tokens_after_packing
    return InterruptibleIterator(arrivals(parts, job.state.policy, job.world.device, cap), ahead=ahead)


def _vote(job: Job, arrival: Arrival | None, stop: Stop, setup: StepSetup) -> Vote:
    """What this rank says before the step; `arrival` is None where it gave up waiting for its data."""
    written, error = job.saver.written, job.trouble
    if arrival is None:
        none = dict.fromkeys(job.state.policy.loss_weights, 0.0)
        return Vote(none, error=error, has_batch=False, has_written=written, stop=stop)
    part = arrival.part
    numbers = part.num_substituted, arrival.num_cut, *size_of(part.batch, setup.max_samples, setup.max_tokens)
    return Vote(arrival.counts, *numbers, error or part.error, has_written=written, stop=stop)


def _account(job: Job, meter: Meter, sinks: Sinks, agreement: Agreement) -> None:
    """What a step that was taken leaves behind: counters, and a row of numbers now and then."""
    job.progress.enter("log")
    trainer, step = job.settings.trainer, job.state.step
    _check_windows(job, agreement.num_substituted)
    if _count(job, "cut", agreement.num_cut):
        message = "step %d: %d prompts so far have more tokens than the policy takes, and were cut; raise its limit"
        log.warning(message, step, job.counters["cut"])
    if step % trainer.log_every == 0 or step == trainer.steps or agreement.stop is not Stop.NONE:
        reading = meter.read()
        check_skipped(step, reading.in_a_row, trainer.max_skipped_steps)
        with job.noted():
            sinks.write(step, meter.row(reading, job.counters))
            for check in job.checks:
                check()


def _count(job: Job, counter: str, num: int) -> bool:
    """Add to a counter of the run; whether to say so: at the first, then at each doubling."""
    before = job.counters[counter]
    job.counters[counter] += num
    return job.counters[counter].bit_length() > before.bit_length()


def _check_windows(job: Job, num_substituted: int) -> None:
    if _count(job, "bad", num_substituted):
        message = "step %d: %d windows so far can't be read and were replaced by others: %s"
        log.warning(message, job.state.step, job.counters["bad"], job.run_dir / QUARANTINE)
    seen = job.state.step * job.settings.trainer.global_batch_size
    check_windows(
        job.counters["bad"], seen, job.settings.data.bad_samples, partial(last_remedy, job.run_dir / QUARANTINE)
    )


def _validate(job: Job, sinks: Sinks, stop: StopFlag) -> Stop:
    """The passes and their row; the stop when they were left unfinished, which leaves no row.

    Where the pass fails, the step is saved before its error is raised.
    """
    started, state, step = time.perf_counter(), job.state, job.state.step
    try:
        measured = job.validation.run(state.policy, state.replicas, state.ema, stop, job.progress)
    except Stopped as stopped:
        return stopped.code
    except Exception:
        # Broad, and not to be split: whatever it was, it says nothing of the steps before, and goes on as it came.
        if job.saver.step != step and job.world.all_meet(f"validation/{step}"):
            _save(job, sinks, at_once=True)
        raise
    job.counters["validated"] = step
    with job.noted():
        if job.ranking is not None and job.ranking.last is not None and measured.scores is not None:
            sinks.compare(changes(job.ranking.compared, measured.scores.sums, job.ranking.last.sums))
        sinks.write(step, {**measured.row, "Timing/Validation": time.perf_counter() - started})
        if job.world.is_main:
            measured.keep(job.run_dir / "plots", step)
            for picture in measured.pictures:
                sinks.image(step, picture.tag, picture.pixels)
        sinks.flush()  # the checkpoint says below that the row is there
    with job.noted():
        if job.ranking is not None and measured.scores is not None:
            job.ranking.update(job.world, step, measured.scores)
    job.saver.recount(step, job.counters)
    _point_links(job)
    return Stop.NONE


def _save(job: Job, sinks: Sinks, *, at_once: bool) -> None:
    """`at_once`: the run ends here. A copy of the state in memory would only take time and room."""
    job.progress.enter("save")
    with job.noted():
        sinks.flush()
    stream = save_state(job.tape, job.state.step)
    job.counters["skipped"] = int(job.state.skipped[0])
    # The one before first, so that a link holds it where it is to stay before the next one retires what nothing names.
    job.world.agree(job.place.check)
    _report_save(job, job.saver.finish)
    save = partial(job.saver.save, job.state, stream=stream, counters=job.counters, at_once=at_once)
    _report_save(job, save)


def _report_save(job: Job, call: Callable[[], Path | None]) -> None:
    """Make a `call` of the saver's, and report the checkpoint that it has committed. Raises as it does, and
    `RunDirLost` where that is why."""
    try:
        path = call()
    except Fault:  # on all ranks alike
        job.world.agree(job.place.check)
        raise
    if path is not None and job.world.is_main:
        log.info("saved %s", path)
        _point_links(job)


def _point_links(job: Job) -> None:
    if job.ranking is not None and job.world.is_main:
        with job.noted():
            job.ranking.point()


def _open_sinks(job: Job, tree: dict[str, Any], begun: dict[str, Sink]) -> Sinks:
    """Rank 0 writes; the other ranks have no sink. Raises `UserError` on all ranks where one can't be opened."""
    context = context_of(job.settings, tree, job.run_dir, job.state.step, job.state.policy.classes)
    return job.world.agree(lambda: open_sinks(job.settings.logger, context, begun) if job.world.is_main else Sinks([]))
