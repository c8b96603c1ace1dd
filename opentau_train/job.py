"""All that a run trains with, on one rank: built from the settings, and put back to where a checkpoint left it.

`prepare` is collective: ranks agree after each part that can fail on one of them only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from opentau_train import rng, strangers
from opentau_train.checkpoints import assets, base, contents
from opentau_train.checkpoints.best import Ranking
from opentau_train.checkpoints.card import FOLDER, Pretrained, read_card, read_stats
from opentau_train.checkpoints.convention import convention_of
from opentau_train.checkpoints.place import Place, begin_run
from opentau_train.checkpoints.published import published_statistics
from opentau_train.checkpoints.room import warn_of_room
from opentau_train.checkpoints.saver import Saver
from opentau_train.checkpoints.start import Start, begin, sketch_policy, spread_policy
from opentau_train.config import drift
from opentau_train.config.settings import Settings, current
from opentau_train.config.typed import instantiate
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.mixture.split import check_split
from opentau_train.data.mixture.table import mixture_table
from opentau_train.data.order.state import changed, order_version, resume_offset, save_state
from opentau_train.data.order.tape import Tape
from opentau_train.distributed.memory import announce, footprint, name_of, saved_bytes
from opentau_train.distributed.opening import normalise_together, open_together
from opentau_train.distributed.parallel import PRECISIONS, Execution, check_batch, data_mesh
from opentau_train.distributed.performance import ForwardFlops
from opentau_train.distributed.rehearsal import Rehearsal
from opentau_train.distributed.stopping import Stop
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World
from opentau_train.errors import Explained, machine_fault
from opentau_train.models.average import Ema
from opentau_train.models.finetune import summary
from opentau_train.models.packing.limits import check_cap
from opentau_train.optim import build_optimizer, schedule_warnings
from opentau_train.sinks.summary import Facts, start_summary
from opentau_train.step import StepSetup, TrainState
from opentau_train.validation.passes import Validation, open_evaluators

log = logging.getLogger(__name__)


@dataclass
class Job:
    """All that the loop needs, on one rank. Counters since the run began: `bad` windows, `cut` prompts, `skipped`
    steps, and the last step that was `validated`."""

    settings: Settings
    world: World
    place: Place
    mixture: Mixture
    tape: Tape
    validation: Validation
    ranking: Ranking | None
    state: TrainState
    schedule: Any
    saver: Saver
    max_samples: int
    counters: dict[str, int] = field(default_factory=lambda: {"bad": 0, "cut": 0, "skipped": 0, "validated": 0})
    progress: Progress = field(default_factory=Progress)
    checks: list[Callable[[], None]] = field(default_factory=list)
    """What rank 0 looks at with each row: they raise where it can't go on."""
    trouble: Explained | None = None
    """What this rank alone has met, to be told by the next vote."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, rank 0 alone writes: what ends that (a full disk) is told to all ranks by the next vote."""
        try:
            yield
        except (Explained, OSError) as error:
            self.trouble = error if isinstance(error, Explained) else machine_fault(error, self.run_dir)
            if self.trouble is None:
                raise

    def raise_trouble(self) -> None:
        """Raises the `trouble`, if there is any."""
        if self.trouble is not None:
            raise self.trouble

    @property
    def run_dir(self) -> Path:
        return self.place.run_dir

    @property
    def owes_validation(self) -> bool:
        """Whether the state's step must be validated and hasn't been: a run stopped inside the pass owes it when
        resumed."""
        every, step = self.settings.validation.every, self.state.step
        due = every > 0 and step > 0 and (step % every == 0 or step == self.settings.trainer.steps)
        return due and self.validation.has_work and self.counters["validated"] < step

    @property
    def is_ranked(self) -> bool:
        """Whether the state's weights are the best that were validated, or those of the lowest loss."""
        return self.ranking is not None and self.state.step in self.ranking.steps

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        trainer = self.settings.trainer
        return self.settings.optimizer.rate(trainer.global_batch_size) * self.schedule(self.state.step, trainer.steps)

    def must_save(self, stop: Stop) -> bool:
        """Whether the state must be saved: the run ends with it, or a regular checkpoint is due."""
        step, every = self.state.step, self.settings.checkpoint.every
        due = every > 0 and step % every == 0
        return due or stop is not Stop.NONE or step == self.settings.trainer.steps

    def must_save_validated(self, stop: Stop) -> bool:
        """Whether the state must be saved after its validation, which `stop` may have ended: it is the best, the
        lowest or the last one, and wasn't saved before."""
        return (self.is_ranked or stop is not Stop.NONE) and self.saver.step != self.state.step

    def step_setup(self) -> StepSetup:
        """How this job's steps are taken."""
        grad_clip, seed = self.settings.trainer.grad_clip, self.settings.seed
        flops = ForwardFlops() if self.world.device.type == "cuda" else None
        max_tokens = self.settings.data.max_num_tokens_after_packing
        return StepSetup(self.world, self.max_samples, grad_clip, seed, self.progress, flops, max_tokens)


def prepare(settings: Settings, tree: dict[str, Any], world: World, place: Place, progress: Progress) -> Job:
    """Open the data, build the policy and its optimizer, and load the checkpoint of `place`; `progress` is the job's.

    Raises `UserError` for mistakes in configuration or data, on all ranks alike.
    """
    trainer = settings.trainer
    check_batch(trainer.global_batch_size, world.data_size)
    evaluators = open_evaluators(settings.validation)
    mesh = mesh_of(settings, world)
    run_dir, checkpoint = place.run_dir, place.checkpoint
    start = _start(settings, tree, world, checkpoint)
    opened = open_together(settings, world)
    model, precision = settings.model, trainer.precision
    sketched = world.agree(lambda: sketch_policy(model, opened.spec, start, precision))
    world.agree(lambda: opened.check_prompts(sketched.wants()) if world.is_main else None)
    cap = settings.data.max_num_tokens_after_packing
    world.agree(lambda: check_cap(sketched, opened.datasets, opened.spec, cap) if world.is_main else None)
    stats = world.agree(lambda: _given_statistics(settings, opened, checkpoint))
    mixture = normalise_together(opened, settings, world, progress, stats)
    tape = mixture.tape(trainer.global_batch_size)
    torch.manual_seed(rng.key(settings.seed, "init") >> 1)  # some devices' generators take 63 bits
    execution = Execution(
        trainer.precision,
        settings.parallelism.activation_checkpointing,
        settings.parallelism.gather_once,
        trainer.compile_backend if trainer.compile else None,
    )
    policy, replicas = spread_policy(model, mixture.spec, world, mesh, execution, start)
    mixture = world.agree(lambda: mixture.for_policy(policy.wants()))
    schedule = world.agree(lambda: instantiate(settings.scheduler, "scheduler"))
    optimizer = world.agree(lambda: build_optimizer(policy, settings.optimizer))
    ema = Ema.of(policy, trainer)
    state = TrainState(policy, replicas, optimizer, ema)
    share = trainer.global_batch_size // world.data_size
    max_samples = min(settings.data.max_samples_per_batch or share, share)
    validation = Validation(mixture, settings.validation, evaluators, world, max_samples)
    compared = validation.compared(policy)
    ranking = None if compared is None else Ranking(run_dir, compared, settings.validation.best_margin)
    convention = convention_of(mixture)
    convention[assets.KEY] = world.agree(lambda: assets.collect(policy) if world.is_main else {})
    if policy.borrowed:
        convention[base.KEY] = world.agree(lambda: start.record() if world.is_main else None)
    card = Pretrained(tree, {h: s.to_json() for h, s in mixture.stats.items()}, convention)
    rehearsal = Rehearsal(sketched, mixture.spec, world.device.type)
    num_bytes = saved_bytes(rehearsal, settings, policy.borrowed) if world.is_main else None
    saver = Saver(run_dir, world, settings.checkpoint, card, num_bytes)
    job = Job(
        *(settings, world, place, mixture, tape, validation, ranking, state, schedule, saver, max_samples),
        progress=progress,
    )
    if world.is_main:
        _tell(job, rehearsal)
    world.agree(lambda: begin_run(run_dir, tree) if world.is_main else None)
    if checkpoint is not None:
        _resume(job, checkpoint)
    if num_bytes is not None:
        warn_of_room(saver.folder, settings, state.step, num_bytes)
    return job


def _tell(job: Job, rehearsal: Rehearsal) -> None:
    """Say what is going to be trained, on what, and what it takes."""
    settings, world, policy, mixture = job.settings, job.world, job.state.policy, job.mixture
    log.info(mixture_table(mixture, job.validation.num_windows))
    held = footprint(rehearsal, settings, world.data_size)
    words = name_of(world.device), PRECISIONS[settings.trainer.precision], summary(policy), str(held)
    sizes = sum(p.numel() for p in policy.parameters()), world.data_size, job.max_samples, sum(mixture.draws)
    log.info("%s", start_summary(Facts(settings, job.run_dir, *words, *sizes, tuple(policy.encoders))))
    for line in schedule_warnings(settings.scheduler, settings.trainer.steps):
        log.warning(line)
    announce(rehearsal, settings, world.data_size, world.device)


def _start(settings: Settings, tree: dict[str, Any], world: World, checkpoint: Path | None) -> Start:
    """How the policy begins: a new run's, or with the frozen weights of the checkpoint that is gone on from."""
    if checkpoint is None:
        return world.once_a_node(lambda: begin(settings.model, settings.finetune))
    world.agree(lambda: _compare(settings, tree, checkpoint))
    entry = world.agree(lambda: read_card(checkpoint / FOLDER).policy.get(base.KEY))
    if entry is None:
        return Start(finetune=settings.finetune)
    first = world.once_a_node(lambda: base.base_of(entry, settings.model, "model"))
    return Start(first, settings.finetune)


def _given_statistics(settings: Settings, opened: Mixture, checkpoint: Path | None) -> dict[str, HeadStats] | None:
    """Those of the checkpoint or of `data.statistics_path`; None: to be computed."""
    if checkpoint is not None:
        return read_stats(checkpoint / FOLDER)
    path = settings.data.statistics_path
    return None if path is None else published_statistics(path, opened)


def _compare(settings: Settings, tree: dict[str, Any], checkpoint: Path) -> None:
    """Log the settings that differ from the checkpoint's. Raises `UserError` for one that may not."""
    with strangers.understood("the checkpoint's settings", checkpoint / FOLDER):
        changes = drift.compare(current(read_card(checkpoint / FOLDER).config), current(tree))
    resume = settings.resume
    drift.check(changes, resume.force, restart=resume.data == "restart")
    lines = drift.report(changes, resume.force, restart=resume.data == "restart")
    if lines:
        log.info("settings that differ from the checkpoint's:\n%s", "\n".join(f"  {line}" for line in lines))


def mesh_of(settings: Settings, world: World) -> DeviceMesh | None:
    """The mesh that `parallelism` asks for (`data_mesh`). Collective; raises `UserError` on all ranks alike."""
    degrees = settings.parallelism
    return data_mesh(world, degrees.data_parallel_replicate_degree, degrees.data_parallel_shard_degree)


def _resume(job: Job, checkpoint: Path) -> None:
    """Put the new job back to where `checkpoint` left its run."""
    restart = job.settings.resume.data == "restart"

    def same_split() -> None:
        with strangers.understood("the held-out episodes", checkpoint / FOLDER):
            check_split(read_card(checkpoint / FOLDER).policy["held_out"], job.mixture, restart=restart)

    def same_stream() -> int:
        with strangers.understood("the stream's state", checkpoint / contents.RUN):
            job.tape = job.mixture.tape(job.settings.trainer.global_batch_size, order_version(saved["stream"]))
            return resume_offset(job.tape, saved["stream"], job.state.step, restart=restart)

    job.world.agree(same_split)
    saved = contents.load(checkpoint, job.state, job.world)
    offset = job.world.agree(same_stream)
    job.tape = job.tape.moved(offset)
    job.counters.update(saved["counters"])
    job.saver.run = saved
    job.state.skipped = torch.tensor([job.counters["skipped"], 0])
    if job.ranking is not None:
        job.ranking.restore(job.world, job.state.step)
    if job.world.is_main:
        log.info("resumed from %s at step %d", checkpoint, job.state.step)
        for change in changed(saved["stream"], save_state(job.tape, job.state.step)):
            log.warning("the data plan has changed: %s; its next epoch begins", change)
