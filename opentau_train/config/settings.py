"""Settings: typed, frozen, checked once when Hydra has composed them, never changed afterwards.

The dataclasses below and those of `config_data` are the whole vocabulary of `conf/`. `typed.build` turns the composed
tree into them and answers a mistake with the key's full path, the nearest valid name and the remedy. Torch is not
imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opentau_train.config.data import DataSettings
from opentau_train.config.typed import at_least, build, convert, fraction, positive
from opentau_train.errors import UserError, did_you_mean


@dataclass(frozen=True)
class TrainerSettings:
    steps: int
    global_batch_size: int
    grad_clip: float | None = 1.0
    log_every: int = 10
    step_timeout: float = 1800.0
    """Seconds without progress (a step, a validation batch, a save) before the job ends with every rank's stack."""
    precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    """torch.compile, block by block."""
    compile_backend: str = "inductor"
    stop_after: int | None = None
    """Stop after so many steps of this process, as when preempted: saved, exit code 75. The schedule doesn't change."""
    ema_decay: float | None = None
    max_skipped_steps: int = 20
    """Consecutive steps with a non-finite gradient before the run stops."""
    device: Literal["auto", "cpu"] = "auto"
    deterministic: bool = False

    def check(self, path: str) -> None:
        for name in ("steps", "global_batch_size", "grad_clip", "log_every", "step_timeout", "max_skipped_steps"):
            positive(f"{path}.{name}", getattr(self, name))
        positive(f"{path}.stop_after", self.stop_after)
        if self.ema_decay is not None:
            fraction(f"{path}.ema_decay", self.ema_decay)


@dataclass(frozen=True)
class OptimizerSettings:
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4

    def check(self, path: str) -> None:
        positive(f"{path}.lr", self.lr)
        positive(f"{path}.eps", self.eps)
        at_least(f"{path}.weight_decay", self.weight_decay, 0.0)
        for beta in self.betas:
            fraction(f"{path}.betas", beta)


@dataclass(frozen=True)
class ParallelismSettings:
    """Degrees: -1 = what is left of the world size."""

    data_parallel_replicate_degree: int = -1
    data_parallel_shard_degree: int = 1
    activation_checkpointing: bool = False
    """true = each block keeps only its input and computes its inside again in the backward pass."""
    gather_once: bool = False
    """true = a sharded policy is gathered once a step, not twice a micro-batch, and held whole for that long."""

    def check(self, path: str) -> None:
        for name in ("data_parallel_replicate_degree", "data_parallel_shard_degree"):
            value = getattr(self, name)
            if value != -1 and value < 1:
                raise UserError(f"{path}.{name} must be -1 or at least 1, got {value}", remedy=f"set {path}.{name}=-1")


EVALUATORS = {
    "loss": {"_target_": "opentau_train.validation.losses.LossEvaluator"},
    "action": {"_target_": "opentau_train.validation.actions.ActionEvaluator"},
}
"""The evaluators of the program itself, as conf/validation/evaluator/ has them with their options."""


@dataclass(frozen=True)
class ValidationSettings:
    every: int = 500
    """Steps between passes; 0 = never. The last step always validates when this is not 0."""
    batch_size: int | None = None
    max_samples_per_group: int | None = None
    num_noise_draws: int = 1
    evaluators: tuple[str, ...] = ("loss",)
    """What a pass measures, in this order: names of `evaluator`."""
    evaluator: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(EVALUATORS))
    """{name: {_target_, its own options}}: what may be named. The settings around it are those of all evaluators."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """A window that can't be read: end the run with its name, or leave it out, count and name it."""
    best_margin: float | None = 2.0
    """Standard errors of the paired difference by which a pass must beat the best one to become
    `checkpoints/best`; null = no best checkpoint."""

    def check(self, path: str) -> None:
        at_least(f"{path}.every", self.every, 0)
        for name in ("batch_size", "max_samples_per_group", "num_noise_draws"):
            positive(f"{path}.{name}", getattr(self, name))
        at_least(f"{path}.best_margin", self.best_margin, 0)
        for name in self.evaluators:
            if name not in self.evaluator:
                raise UserError(
                    f"no evaluator is called '{name}'{did_you_mean(name, self.evaluator)}",
                    where=f"{path}.evaluators",
                    remedy=f"choose of {', '.join(self.evaluator)}, or define it with {path}.evaluator.{name}._target_",
                )
        if len(set(self.evaluators)) < len(self.evaluators):
            raise UserError(
                f"{path}.evaluators names one twice: {', '.join(self.evaluators)}",
                remedy=f"set {path}.evaluators=[{','.join(dict.fromkeys(self.evaluators))}]",
            )
        if self.every and not self.evaluators:
            raise UserError(
                f"{path}.evaluators is empty",
                remedy=f"set {path}.evaluators=[loss], or {path}.every=0 for a run without validation",
            )


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = 1000
    """Steps between checkpoints; 0 = only the last one."""
    asynchronous: bool = field(default=False, metadata={"key": "async"})
    """true = training stops only for a copy in memory and goes on while a thread writes it."""
    keep_last: int | None = 3
    """The newest ones to keep; null = all."""
    keep_every: int | None = None
    """Keep those of every so many steps too, for ever."""

    def check(self, path: str) -> None:
        at_least(f"{path}.every", self.every, 0)
        positive(f"{path}.keep_last", self.keep_last)
        positive(f"{path}.keep_every", self.keep_every)


@dataclass(frozen=True)
class PathSettings:
    root: str = "runs"
    run_dir: str | None = None
    """Where everything of the run goes; null = a new directory `root/NAME-TIME`."""
    cache_dir: str = "~/.cache/opentau_train"

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir).expanduser()

    def check(self, path: str) -> None: ...


@dataclass(frozen=True)
class ResumeSettings:
    """`resume=X` is short for `resume.checkpoint=X`, on the command line and in YAML."""

    checkpoint: str = "never"
    """never | auto | the path of a checkpoint or run directory."""
    data: Literal["exact", "restart"] = "exact"
    """exact = refuse when the data plan has changed; restart = begin the changed plan's next epoch."""
    force: tuple[str, ...] = ()
    """Other settings that a resume would refuse to change (`drift`), and that may: their keys, or the start of them."""

    def check(self, path: str) -> None:
        if self.data == "restart" and self.checkpoint == "never":
            raise UserError(
                f"{path}.data=restart without a checkpoint to go on from",
                remedy=f"add {path}=auto or {path}=PATH, or leave {path}.data out",
            )


@dataclass(frozen=True)
class Settings:
    """The whole composed configuration.

    `model`, `scheduler` and each entry of `logger` name a class with `_target_`; their other keys are checked
    against that class's signature when it is built (`typed.instantiate`).
    """

    data: DataSettings
    model: dict[str, Any]
    trainer: TrainerSettings
    optimizer: OptimizerSettings
    scheduler: dict[str, Any]
    validation: ValidationSettings
    checkpoint: CheckpointSettings
    parallelism: ParallelismSettings
    paths: PathSettings
    logger: dict[str, dict[str, Any]]
    name: str = "train"
    seed: int = 0
    resume: ResumeSettings = field(default_factory=ResumeSettings)
    flight_recorder: bool = False
    """true = every rank records each step's samples and their losses (`recorder.py`)."""

    def check(self, path: str) -> None:
        if not self.data.sources:
            raise UserError(
                "no dataset is configured: data.sources is empty",
                where="data.sources",
                remedy="add +recipe=droid_policy, or +recipe=lerobot data.sources.main.root=PATH",
            )


def load_settings(tree: Mapping[str, Any]) -> Settings:
    """The typed settings of a composed, resolved configuration tree. Raises `UserError`."""
    if isinstance(tree.get("resume"), str):
        tree = {**tree, "resume": {"checkpoint": tree["resume"]}}
    return build(Settings, current(tree), "")


def current(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration tree with what older versions called otherwise under its name of now, so that their runs go on:
    `validation.metrics`, a list beside the losses, and the options of the action errors."""
    validation = tree.get("validation")
    if not isinstance(validation, Mapping):
        return tree
    values = dict(validation)
    more = values.pop("metrics", ())
    options = {new: values.pop(old) for old, new in _ACTION_OPTIONS.items() if old in values}
    if values.keys() == validation.keys():
        return tree
    names, path = tuple[str, ...], "validation.evaluators"
    chosen = [*convert(names, values.get("evaluators", ("loss",)), path), *convert(names, more, "validation.metrics")]
    defined = convert(dict[str, dict[str, Any]], values.get("evaluator", EVALUATORS), "validation.evaluator")
    defined["action"] = {**defined.get("action", EVALUATORS["action"]), **options}
    return {**tree, "validation": {**values, "evaluators": list(dict.fromkeys(chosen)), "evaluator": defined}}


_ACTION_OPTIONS = {"max_action_samples": "max_samples_per_group", "num_action_plots": "num_plots"}
"""{key of validation: option of its evaluator `action`}"""
