"""Settings: typed, frozen, checked once when Hydra has composed them, never changed afterwards.

The dataclasses below and those of `config.data` are the whole vocabulary of `conf/`. `typed.build` turns the composed
tree into them and answers a mistake with the key's full path, the nearest valid name and the remedy. Torch is not
imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opentau_train.config import weights
from opentau_train.config.bounds import Count, Fraction, Natural, NotNegative, Positive
from opentau_train.config.data import DataSettings
from opentau_train.config.finetune import FinetuneSettings
from opentau_train.config.optimizer import OptimizerSettings
from opentau_train.config.resuming import NEW_PLAN, SAFE, Meaning, judged, longer, other_average, refused, warned
from opentau_train.config.typed import build, convert
from opentau_train.errors import UserError, did_you_mean


@dataclass(frozen=True)
class TrainerSettings:
    steps: Count = field(metadata=judged(longer))
    """Optimizer steps of the run."""
    global_batch_size: Count = field(metadata=NEW_PLAN)
    """Samples of an optimizer step, over all ranks and micro-batches."""
    grad_clip: Positive | None = 1.0
    """Largest norm of the gradient over all parameters; null = any."""
    log_every: Count = field(default=10, metadata=SAFE)
    """Steps between the rows that are logged."""
    step_timeout: Positive = field(default=1800.0, metadata=SAFE)
    """Seconds without progress (a step, a validation batch, a save) before the job ends with every rank's stack."""
    precision: Literal["no", "bf16", "bf16_params"] = "no"
    """no = float32; bf16 = float32 parameters, computed in bfloat16; bf16_params = bfloat16 parameters, too."""
    compile: bool = field(default=False, metadata=SAFE)
    """torch.compile, block by block."""
    compile_backend: str = field(default="inductor", metadata=SAFE)
    """Of torch.compile: inductor, aot_eager, ..."""
    stop_after: Count | None = field(default=None, metadata=SAFE)
    """Stop after so many steps of this process, as when preempted: saved, exit code 75. The schedule doesn't change."""
    ema_decay: Fraction | None = field(default=None, metadata=judged(other_average))
    """Keep an average of the weights that decays so much a step, and validate and export it, e.g. 0.999."""
    ema_sigma_rel: float | None = field(default=None, metadata=judged(other_average))
    """Instead of a constant decay: the average's width, as a share of the steps so far (see `Ema`)."""
    reference_samples: Count | None = field(default=None, metadata=SAFE)
    """Samples of the training that a recipe follows: the start says at which step this run has seen as many."""
    max_skipped_steps: Count = field(default=20, metadata=SAFE)
    """Consecutive steps with a non-finite gradient before the run stops; noticed at the next row, see `log_every`."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=SAFE)
    """auto = an accelerator where there is one; cuda = an error where there is none."""
    deterministic: bool = False
    """Only kernels that give the same result each time."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 products on a device that has faster ones: `highest`, torch's own default, is float32;
    `high` lets CUDA round the factors to TF32 (10 bits of mantissa), `medium` to bfloat16. bf16 autocast doesn't depend
    on it."""
    profile_steps: Natural = field(default=0, metadata=SAFE)
    """Steps that torch.profiler records on rank 0, after the first three: RUN/profile/trace.json."""

    @property
    def has_ema(self) -> bool:
        """Whether an average of the weights is kept."""
        return self.ema_decay is not None or self.ema_sigma_rel is not None

    def check(self, path: str) -> None:
        if self.ema_sigma_rel is not None:
            if self.ema_decay is not None:
                remedy = f"set {path}.ema_decay=null or {path}.ema_sigma_rel=null"
                raise UserError(f"{path} has two averages", remedy=remedy)
            if not 0.0 < self.ema_sigma_rel < 0.28:  # 1 / sqrt(12) is that of equal weights
                raise UserError(
                    f"{path}.ema_sigma_rel must lie between 0 and 0.28, got {self.ema_sigma_rel}",
                    remedy=f"set {path}.ema_sigma_rel=0.1",
                )


@dataclass(frozen=True)
class ParallelismSettings:
    """How a policy is spread over the ranks. A degree of -1 is what is left of the world size."""

    data_parallel_replicate_degree: int = -1
    """Copies of the policy; -1 = what is left of the world size."""
    data_parallel_shard_degree: int = 1
    """Ranks over which a copy is spread; -1 = what is left of the world size."""
    activation_checkpointing: bool = False
    """true = each block keeps only its input and computes its inside again in the backward pass."""
    gather_once: bool = False
    """true = a sharded policy is gathered once a step, not twice a micro-batch, and held whole for that long."""

    def check(self, path: str) -> None:
        for name in ("data_parallel_replicate_degree", "data_parallel_shard_degree"):
            value = getattr(self, name)
            if value != -1 and value < 1:
                raise UserError(f"{path}.{name} must be -1 or at least 1, got {value}", remedy=f"set {path}.{name}=-1")


_VIDEO = "opentau_train.validation.video.VideoEvaluator"
EVALUATORS: dict[str, dict[str, Any]] = {
    "loss": {"_target_": "opentau_train.validation.losses.LossEvaluator"},
    "action": {"_target_": "opentau_train.validation.actions.ActionEvaluator"},
    "video": {"_target_": _VIDEO, "max_samples_per_group": 32, "num_strips": 2},
    "rollout": {"_target_": "opentau_train.simulation.evaluator.RolloutEvaluator", "environments": {}},
}
"""The evaluators of the program itself, as conf/validation/evaluator/ has them with their options."""


@dataclass(frozen=True)
class ValidationSettings:
    every: Natural = field(default=500, metadata=SAFE)
    """Steps between passes; 0 = never. The last step always validates when this is not 0."""
    batch_size: Count | None = field(default=None, metadata=SAFE)
    """Samples that a rank validates at once; null = the training micro-batch."""
    max_samples_per_group: Count | None = None
    """Validate a fixed systematic sample of each (dataset, control_mode); null = all held-out windows."""
    num_noise_draws: Count = 1
    """Noise and flow time are drawn so often a sample, and its losses averaged."""
    evaluators: tuple[str, ...] = ("loss",)
    """What a pass measures, in this order: names of `evaluator`."""
    evaluator: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(EVALUATORS))
    """{name: {_target_, its own options}}: what `evaluators` may name. The settings around it are those of all
    evaluators."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """A window that can't be read: end the run with its name, or leave it out, count and name it."""
    best: Literal["loss", "rollout/success"] = "loss"
    """What `checkpoints/best` is the best in: the loss, or the success rate in simulators."""
    best_margin: NotNegative | None = 2.0
    """Standard errors of the paired difference by which a pass must beat the best one to become
    `checkpoints/best`; null = no best checkpoint. `checkpoints/lowest` needs no margin."""

    @property
    def chooses_best(self) -> str:
        """The evaluator whose scores choose it."""
        return self.best.partition("/")[0]

    def check(self, path: str) -> None:
        for name in self.evaluators:
            if name not in self.evaluator:
                raise UserError(
                    f"no evaluator is called '{name}'{did_you_mean(name, self.evaluator)}",
                    where=f"{path}.evaluators",
                    remedy=f"choose of {', '.join(self.evaluator)}, or define it with {path}.evaluator.{name}._target_",
                )
        if self.best != "loss" and self.chooses_best not in self.evaluators:
            raise UserError(
                f"{path}.best={self.best}, and {path}.evaluators has no '{self.chooses_best}'",
                remedy=f"set {path}.evaluators=[{','.join([*self.evaluators, self.chooses_best])}]",
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
    every: Natural = 1000
    """Steps between checkpoints; 0 = only the last one."""
    asynchronous: bool = field(default=True, metadata={"key": "async"})
    """true = training stops only for a copy in memory, and goes on while a thread writes it; false = until all is
    written, which takes no memory."""
    keep_last: Count | None = 3
    """The newest ones to keep; null = all."""
    keep_every: Count | None = None
    """Keep those of every so many steps too, for ever."""
    verify: bool = field(default=True, metadata=SAFE)
    """true = a resume compares the hashes of a checkpoint's files first (`checkpoints.manifest`)."""

    def check(self, path: str) -> None: ...


@dataclass(frozen=True)
class PathSettings:
    root: str = "runs"
    """Where the directories of runs are made."""
    run_dir: str | None = None
    """Where everything of the run goes; null = a new directory `root/NAME-DATASET-TIME`."""
    cache_dir: str = "~/.cache/opentau_train"
    """Statistics, the built-in sample, and files of servers, for all runs of this machine."""

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


TRAINED_FOR_IT = "the weights were trained for it; none can be loaded whose shape changes"
OF_MODEL = {
    "*_weight": Meaning("warned", "the losses' weights from here on"),
    **dict.fromkeys(("num_flow_steps", "packing"), Meaning("safe")),
    **dict.fromkeys(("text_encoder", "vision_encoder"), weights.ENCODER_ON_RESUME),
    **weights.ON_RESUME,
}


@dataclass(frozen=True)
class Settings:
    """The whole composed configuration.

    `model`, `scheduler` and each entry of `logger` name a class with `_target_`; their other keys are checked
    against that class's signature when it is built (`typed.instantiate`). What a change of a setting means for a run
    that is resumed stands in its field's metadata (`resuming`).
    """

    data: DataSettings = field(metadata=refused(TRAINED_FOR_IT))
    model: dict[str, Any] = field(metadata=refused(TRAINED_FOR_IT, keys=OF_MODEL))
    trainer: TrainerSettings
    optimizer: OptimizerSettings
    scheduler: dict[str, Any]
    validation: ValidationSettings = field(metadata=warned("validation numbers don't compare to those before"))
    checkpoint: CheckpointSettings = field(metadata=SAFE)
    parallelism: ParallelismSettings = field(metadata=SAFE)
    paths: PathSettings = field(metadata=SAFE)
    logger: dict[str, dict[str, Any]] = field(metadata=SAFE)
    name: str = field(default="train", metadata=SAFE)
    """Names the run's directory."""
    seed: int = field(default=0, metadata=NEW_PLAN)
    """Of the order of the samples, the noise, the first weights and everything else that is drawn."""
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    resume: ResumeSettings = field(default_factory=ResumeSettings, metadata=SAFE)
    flight_recorder: bool = field(default=False, metadata=SAFE)
    """true = every rank records each step's samples and their losses (`metrics/recorder.py`)."""

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
    `validation.metrics`, a list beside the losses, and the options of the action errors; and with the evaluators that
    they hadn't yet."""
    validation = tree.get("validation")
    if not isinstance(validation, Mapping):
        return tree
    values = dict(validation)
    more = values.pop("metrics", ())
    options = {new: values.pop(old) for old, new in _ACTION_OPTIONS.items() if old in values}
    if isinstance(values.get("evaluator"), Mapping) and not EVALUATORS.keys() <= values["evaluator"].keys():
        values["evaluator"] = {**EVALUATORS, **values["evaluator"]}
    if values == validation:
        return tree
    names, path = tuple[str, ...], "validation.evaluators"
    chosen = [*convert(names, values.get("evaluators", ("loss",)), path), *convert(names, more, "validation.metrics")]
    defined = convert(dict[str, dict[str, Any]], values.get("evaluator", EVALUATORS), "validation.evaluator")
    defined["action"] = {**defined.get("action", EVALUATORS["action"]), **options}
    return {**tree, "validation": {**values, "evaluators": list(dict.fromkeys(chosen)), "evaluator": defined}}


_ACTION_OPTIONS = {"max_action_samples": "max_samples_per_group", "num_action_plots": "num_plots"}
"""{key of validation: option of its evaluator `action`}"""
