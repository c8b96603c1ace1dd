"""The training application, top to bottom: open the data, build the policy, then

    next batch, step, maybe log, maybe validate, maybe save, stop?

`run` is called by the command line on every rank.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from opentau_train import checkpoint, commit, drift, rng
from opentau_train.best import Best
from opentau_train.config import Settings
from opentau_train.data.assemble import open_mixture
from opentau_train.data.mixture import Mixture
from opentau_train.data.split import check_split, held_out_episodes
from opentau_train.data.stream import training_batches
from opentau_train.data.tape import Tape
from opentau_train.data.tape_state import changed, resume_offset, save_state
from opentau_train.distributed import World, launch
from opentau_train.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED
from opentau_train.meter import Meter
from opentau_train.models.policy import Policy
from opentau_train.optim import Ema, adamw
from opentau_train.parallel import check_batch, data_parallel_degrees, spread
from opentau_train.passes import PICTURE, Plans, plan_passes, run_passes
from opentau_train.plots import save_png
from opentau_train.preflight import identity
from opentau_train.pretrained import FOLDER, Pretrained, read_card, read_stats
from opentau_train.recorder import FlightRecorder
from opentau_train.report import begin_run, log_to, mixture_table, next_steps
from opentau_train.saver import Saver
from opentau_train.sinks.base import SinkContext, Sinks, open_sinks
from opentau_train.step import StepResult, TrainState, check_health, train_step
from opentau_train.stopping import Patient, StopFlag, Stopped, mark_preempted, stop_signals
from opentau_train.typed import bind, instantiate
from opentau_train.watchdog import Place, watch

log = logging.getLogger(__name__)

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
        job = prepare(settings, tree, world)
        stop.watch(job.run_dir, clear=world.is_main)
        console.also_to(job.run_dir / "train.log")
        if job.state.step >= trainer.steps and not job.owes_validation:
            log.info("nothing left to train: %s is at step %d of %d", job.run_dir, job.state.step, trainer.steps)
            return EXIT_OK
        sinks = stack.enter_context(_open_sinks(job, tree))
        stack.enter_context(job.saver)
        recorder = FlightRecorder(job.run_dir, job.tape, job.mixture, world) if settings.flight_recorder else None
        stack.enter_context(nullcontext() if recorder is None else recorder)
        with watch(job.place, job.run_dir, rank=world.rank, size=world.size, timeout=trainer.step_timeout):
            code = _loop(job, sinks, recorder, stop)
        if world.is_main:
            if code == 1:
                mark_preempted(job.run_dir, job.state.step)
            log.info(next_steps(job.run_dir, job.state.step, code))
        return STOP_CODES[code]


@dataclass
class Job:
    """All that the loop needs, on one rank. Counters since the run began: `bad` windows, `skipped` steps, and the last
    step that was `validated`."""

    settings: Settings
    world: World
    run_dir: Path
    mixture: Mixture
    tape: Tape
    plans: Plans
    best: Best | None
    state: TrainState
    schedule: Any
    saver: Saver
    max_samples: int
    counters: dict[str, int] = field(default_factory=lambda: {"bad": 0, "skipped": 0, "validated": 0})
    place: Place = field(default_factory=Place)

    @property
    def owes_validation(self) -> bool:
        """The state's step is one to validate and hasn't been: a run stopped inside the pass owes it when resumed."""
        every, step = self.settings.validation.every, self.state.step
        due = every > 0 and step > 0 and (step % every == 0 or step == self.settings.trainer.steps)
        return due and len(self.plans.loss.windows) > 0 and self.counters["validated"] < step

    @property
    def is_best(self) -> bool:
        """The state's weights are the best that were validated."""
        return self.best is not None and self.best.step == self.state.step


def prepare(settings: Settings, tree: dict[str, Any], world: World) -> Job:
    """Open the data, build the policy and its optimizer, and load the checkpoint that `resume` names."""
    trainer = settings.trainer
    check_batch(trainer.global_batch_size, world.size)
    bind(settings.model, "model", ["spec"])
    bind(settings.scheduler, "scheduler", [])
    for name, options in settings.logger.items():
        bind(options, f"logger.{name}", ["context"])
    degrees = data_parallel_degrees(
        settings.parallelism.data_parallel_replicate_degree, settings.parallelism.data_parallel_shard_degree, world.size
    )
    run_dir, found = world.broadcast(world.agree(lambda: _where(settings) if world.is_main else (Path(), None)))
    stats = None
    if found is not None:
        world.agree(lambda: _compare(settings, tree, found))
        stats = world.agree(lambda: read_stats(found))
    mixture = open_mixture(settings, world, stats)
    tape = mixture.tape(trainer.global_batch_size)
    torch.manual_seed(rng.key(settings.seed, "init") >> 1)
    policy: Policy = world.agree(lambda: instantiate(settings.model, "model", spec=mixture.spec))
    schedule = world.agree(lambda: instantiate(settings.scheduler, "scheduler"))
    replicas = spread(
        policy,
        policy.blocks(),
        world,
        *degrees,
        trainer.precision,
        activation_checkpointing=settings.parallelism.activation_checkpointing,
        compile_backend=trainer.compile_backend if trainer.compile else None,
    )
    ema = Ema(policy, trainer.ema_decay) if trainer.ema_decay is not None else None
    state = TrainState(policy, replicas, adamw(policy, settings.optimizer), ema)
    share = trainer.global_batch_size // world.size
    max_samples = min(settings.data.max_samples_per_batch or share, share)
    plans = plan_passes(mixture, settings.validation, batch_size=max_samples, num_ranks=world.size)
    margin = settings.validation.best_margin
    best = None if margin is None else Best(run_dir, plans.loss, policy.loss_weights, margin)
    card = Pretrained(tree, {h: s.to_json() for h, s in mixture.stats.items()}, _convention(mixture))
    saver = Saver(run_dir, world, settings.checkpoint, card)
    job = Job(settings, world, run_dir, mixture, tape, plans, best, state, schedule, saver, max_samples)
    if world.is_main:
        log.info(mixture_table(mixture, plans.loss, sum(p.numel() for p in policy.parameters())))
    world.agree(lambda: begin_run(run_dir, tree) if world.is_main else None)
    if found is not None:
        _resume(job, found)
    return job


def _where(settings: Settings) -> tuple[Path, Path | None]:
    """(run directory, checkpoint to start from or None)."""
    root = Path(settings.paths.root).expanduser()
    run_dir = Path(settings.paths.run_dir).expanduser() if settings.paths.run_dir else None
    if run_dir is None and settings.resume.checkpoint == "auto":
        run_dir = commit.newest_run(root, settings.name)
    found = commit.resolve(settings.resume.checkpoint, run_dir)
    if run_dir is None and found is not None:
        run_dir = found.parent.parent
    if run_dir is None:
        run_dir = root / f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return run_dir.absolute(), found


def _compare(settings: Settings, tree: dict[str, Any], found: Path) -> None:
    """Print what differs from the checkpoint's settings. Raises `UserError` where it may not."""
    changes = drift.compare(read_card(found / FOLDER).config, tree)
    resume = settings.resume
    drift.check(changes, resume.force, restart=resume.data == "restart")
    shown = drift.report(changes, resume.force, restart=resume.data == "restart")
    if shown:
        log.info("settings that differ from the checkpoint's:\n%s", "\n".join(f"  {line}" for line in shown))


def _resume(job: Job, found: Path) -> None:
    restart = job.settings.resume.data == "restart"
    job.world.agree(lambda: check_split(read_card(found / FOLDER).policy["held_out"], job.mixture, restart=restart))
    saved = checkpoint.load(found, job.state, job.world)
    job.tape.offset = job.world.agree(lambda: resume_offset(job.tape, saved["stream"], job.state.step, restart=restart))
    job.counters.update(saved["counters"])
    job.state.skipped = job.counters["skipped"]
    if job.best is not None:
        job.best.restore(job.world, job.state.step)
    if job.world.is_main:
        log.info("resumed from %s at step %d", found, job.state.step)
        for change in changed(saved["stream"], save_state(job.tape, job.state.step)):
            log.warning("the data plan has changed: %s; its next epoch begins", change)


def _convention(mixture: Mixture) -> dict[str, Any]:
    """What a user of the weights must know of inputs and outputs."""
    return {
        "actions": "as the dataset's action columns, normalised by the norm head's statistics",
        "normalization": mixture.settings.normalization,
        "spec": asdict(mixture.spec),
        "norm_heads": {g.norm_head: list(mixture.stats[g.norm_head].action_names) for g in mixture.groups},
        "fps": {d.name: d.source.fps for d in mixture.datasets},
        "action_names": {d.name: list(d.source.action_names) for d in mixture.datasets},
        "held_out": held_out_episodes(mixture),
    }


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


# -- the loop --------------------------------------------------------------------------------------------------------


def _loop(job: Job, sinks: Sinks, recorder: FlightRecorder | None, stop: StopFlag) -> int:
    """Train until the last step or a stop; returns the stop code that all ranks agreed on."""
    settings, trainer, state, world = job.settings, job.settings.trainer, job.state, job.world
    meter = Meter(job.mixture, job.tape, state, world)
    batches = training_batches(
        job.mixture,
        job.tape,
        rank=world.rank,
        size=world.size,
        first_step=state.step,
        last_step=trainer.steps,
        quarantine=job.run_dir / "quarantine.jsonl",
    )
    code = _validate(job, sinks, stop) if job.owes_validation else 0
    stop_at = state.step + (trainer.stop_after or trainer.steps)
    _point_to_best(job)
    with closing(Patient(batches)) as patient:
        while state.step < trainer.steps and code == 0:
            job.place.enter("data wait", state.step + 1)
            with meter.waiting():
                part = patient.next(stop)
            asked = max(stop.poll(), int(state.step + 1 == stop_at < trainer.steps))
            if part is not None:
                meter.open_decoders = part.open_decoders
            lr = settings.optimizer.lr * job.schedule(state.step, trainer.steps)
            result = train_step(
                state, part, world, trainer, lr=lr, max_samples=job.max_samples, stop=asked, place=job.place
            )
            code = result.stop
            if result.taken:
                if recorder is not None and part is not None and part.batch is not None:
                    recorder.write(state, part.batch, result)
                _account(job, meter, sinks, result)
            _report_save(job, job.saver.poll())
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
    job.counters["bad"] += result.num_substituted
    job.counters["skipped"] = job.state.skipped
    limits = job.settings.data.bad_samples
    seen = job.state.step * job.settings.trainer.global_batch_size
    check_health(job.state, job.settings.trainer, job.counters["bad"], seen, limits.max_fraction, limits.grace)


def _validate(job: Job, sinks: Sinks, stop: StopFlag) -> int:
    """The passes and their row; the stop code when they were left unfinished, which leaves no row."""
    started, state, step = time.perf_counter(), job.state, job.state.step
    try:
        found = run_passes(
            state.policy, state.replicas, state.ema, job.plans, job.world, job.settings.validation, stop, job.place
        )
    except Stopped as stopped:
        return stopped.code
    job.counters["validated"] = step
    sinks.write(step, {**found.row, "Timing/ValidationSeconds": time.perf_counter() - started})
    if found.picture is not None and job.world.is_main:
        save_png(job.run_dir / "plots" / f"actions_{step:08d}.png", found.picture)
        sinks.image(step, PICTURE, found.picture)
    if job.best is not None:
        job.best.offer(job.world, step, found.scores)
    return 0


def _save(job: Job, sinks: Sinks) -> None:
    job.place.enter("save")
    sinks.flush()
    stream = save_state(job.tape, job.state.step)
    _report_save(job, job.saver.save(job.state, stream=stream, counters=job.counters))


def _report_save(job: Job, path: Path | None) -> None:
    if path is not None and job.world.is_main:
        log.info("saved %s", path)
    _point_to_best(job)


def _point_to_best(job: Job) -> None:
    if job.best is not None and job.world.is_main:
        job.best.point()
