"""Settings: typed, frozen, checked once when Hydra has composed them, never changed afterwards.

The dataclasses below are the whole vocabulary of `conf/`. `typed.build` turns the composed tree into them and
answers a mistake with the key's full path, the nearest valid name and the remedy. Torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opentau_train.errors import UserError
from opentau_train.typed import build


def _positive(path: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise UserError(f"{path} must be greater than 0, got {value}", remedy=f"set {path} to a positive number")


def _at_least(path: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise UserError(f"{path} must be at least {low}, got {value}", remedy=f"set {path} to {low} or more")


def _fraction(path: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise UserError(f"{path} must be in [0, 1), got {value}", remedy=f"set {path} to a fraction such as 0.1")


@dataclass(frozen=True)
class SourceSettings:
    """One dataset of the mixture: `data.sources.NAME`."""

    target: str = field(default="opentau_train.data.lerobot.LeRobotSource", metadata={"key": "_target_"})
    root: str | None = None
    """Local directory of the dataset."""
    repo_id: str | None = None
    """Hugging Face Hub name, downloaded once a node when `root` is null."""
    revision: str | None = None
    weight: float | None = None
    """Share in the mixture relative to the other weights; null on all sources = every window once an epoch."""
    val_split_ratio: float = 0.0
    """Share of the episodes held out, by hash of their number; 1.0 = the whole source is for validation only."""
    val_episodes: tuple[int, ...] | None = None
    """The held-out episode numbers themselves, in place of `val_split_ratio`."""
    control_mode: str | None = None
    """joint, ee, mixed, ...; null = from info.json, else from `control_mode_column`, else 'default'."""
    control_mode_column: str = "control_mode"
    robot_type: str | None = None
    mode: Literal["policy", "flow", "tokens"] = "policy"
    """Which heads the source supervises: both, only the flow head (mse), only the binned head (ce)."""
    chunk_length: int | None = None
    sample_stride: int | None = None
    fps: float | None = None
    """Rate of the action chunk and of the history, by time; null = the dataset's own rate."""
    cameras: dict[str, str] | tuple[str, ...] | None = None
    """{camera name: column}, or columns; null = every camera of the dataset."""
    state: tuple[str, ...] | None = None
    actions: tuple[str, ...] | None = None
    prompt_columns: tuple[str, ...] = ()
    """String columns that hold the instruction; none = the dataset's tasks."""
    prompt_separator: str | None = None
    """Splits one text into alternatives, e.g. ' | '."""
    tolerance_s: float = 1e-4
    use_filter_dict: bool = False
    filter_dict_path: str | None = None
    filter_key: str = "{recording_folderpath}--{file_path}"
    """An episode's key in the filter file, over its metadata; unused where the file's keys are episode numbers."""
    filter_rule: Literal["start", "whole"] = "start"
    filter_min_match: float = 0.5
    """Least fraction of the episodes that must be in the filter file."""
    filter_trim_tail: int | None = None
    """Frames to take off each range's end; null = the file's `metadata.filter_last_n_in_ranges`, else none."""
    iterable_shuffle: bool = True
    episodes: tuple[int, ...] | None = None
    exclude_episodes: tuple[int, ...] = ()
    success_only: bool = False
    success_column: str = "next.success"
    """Of the episodes' metadata, or of the rows, whose last one counts."""

    @property
    def validates_only(self) -> bool:
        """Every episode is held out."""
        return self.val_split_ratio == 1.0 and self.val_episodes is None

    def check(self, path: str) -> None:
        _positive(f"{path}.weight", self.weight)
        if not 0.0 <= self.val_split_ratio <= 1.0:
            raise UserError(
                f"{path}.val_split_ratio must be in [0, 1], got {self.val_split_ratio}",
                remedy=f"set {path}.val_split_ratio to a fraction such as 0.1, or 1.0 for validation only",
            )
        if self.validates_only and self.weight is not None:
            raise UserError(
                f"{path} is for validation only (val_split_ratio=1.0) and has a weight, {self.weight:g}, to train with",
                where=f"{path}.weight",
                remedy=f"remove {path}.weight, or lower {path}.val_split_ratio",
            )
        for name in ("chunk_length", "sample_stride", "fps", "tolerance_s"):
            _positive(f"{path}.{name}", getattr(self, name))
        _at_least(f"{path}.filter_trim_tail", self.filter_trim_tail, 0)
        if not 0.0 <= self.filter_min_match <= 1.0:
            raise UserError(f"{path}.filter_min_match must be in [0, 1], got {self.filter_min_match}")
        if self.use_filter_dict and not self.filter_dict_path:
            raise UserError(
                f"{path}.use_filter_dict is true but {path}.filter_dict_path is not set",
                remedy=f"set {path}.filter_dict_path=FILE.json, or {path}.use_filter_dict=false",
            )


@dataclass(frozen=True)
class DropoutSettings:
    """Probabilities to drop an optional input of a training sample; provenance is never dropped."""

    prompt: float = 0.0
    state: float = 0.0
    camera: float = 0.0

    def check(self, path: str) -> None:
        for name in ("prompt", "state", "camera"):
            _fraction(f"{path}.{name}", getattr(self, name))


@dataclass(frozen=True)
class BadSampleSettings:
    """When to stop because windows can't be read."""

    max_fraction: float = 0.01
    grace: int = 16
    """Substitutions a worker allows before `max_fraction` counts."""

    def check(self, path: str) -> None:
        _fraction(f"{path}.max_fraction", self.max_fraction)
        _at_least(f"{path}.grace", self.grace, 0)


@dataclass(frozen=True)
class CorrelationSettings:
    """How alike the gradients of two windows of one episode are, d frames apart: episode + neighbours exp(-d / frames).
    Only predicts the shuffle's quality (`data/quality.py`); `tools/vif.py` measures it."""

    episode: float = 0.1
    neighbours: float = 0.4
    frames: float = 8.0

    def check(self, path: str) -> None:
        for name in ("episode", "neighbours"):
            _fraction(f"{path}.{name}", getattr(self, name))
        _positive(f"{path}.frames", self.frames)


@dataclass(frozen=True)
class DataSettings:
    sources: dict[str, SourceSettings] = field(default_factory=dict)
    builtin_sample: Literal["droid"] | None = None
    """The sample that stands in when no source has a root or repo_id."""
    image_size: tuple[int, int] = (96, 96)
    chunk_length: int = 16
    history: int = 0
    sample_stride: int = 1
    """Windows start every so many frames."""
    drop_tail: bool = False
    """true = only windows whose chunk lies wholly inside the episode."""
    state_dim: int | None = None
    action_dim: int | None = None
    normalization: Literal["mean_std", "min_max", "quantiles"] = "mean_std"
    num_workers: int = 2
    prefetch_factor: int = 2
    max_samples_per_batch: int | None = None
    lanes_per_sample: int = 4
    phase_rows: int = 1024
    blank_images: bool = False
    """true = every image black: the ablation that shows what the images are worth."""
    dropout: DropoutSettings = field(default_factory=DropoutSettings)
    bad_samples: BadSampleSettings = field(default_factory=BadSampleSettings)
    correlation: CorrelationSettings = field(default_factory=CorrelationSettings)

    def check(self, path: str) -> None:
        for name in ("chunk_length", "sample_stride", "state_dim", "action_dim", "lanes_per_sample", "phase_rows"):
            _positive(f"{path}.{name}", getattr(self, name))
        for name in ("prefetch_factor", "max_samples_per_batch"):
            _positive(f"{path}.{name}", getattr(self, name))
        for name in ("history", "num_workers"):
            _at_least(f"{path}.{name}", getattr(self, name), 0)
        for size in self.image_size:
            _at_least(f"{path}.image_size", size, 8)


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
            _positive(f"{path}.{name}", getattr(self, name))
        _positive(f"{path}.stop_after", self.stop_after)
        if self.ema_decay is not None:
            _fraction(f"{path}.ema_decay", self.ema_decay)


@dataclass(frozen=True)
class OptimizerSettings:
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4

    def check(self, path: str) -> None:
        _positive(f"{path}.lr", self.lr)
        _positive(f"{path}.eps", self.eps)
        _at_least(f"{path}.weight_decay", self.weight_decay, 0.0)
        for beta in self.betas:
            _fraction(f"{path}.betas", beta)


@dataclass(frozen=True)
class ParallelismSettings:
    """Degrees: -1 = what is left of the world size."""

    data_parallel_replicate_degree: int = -1
    data_parallel_shard_degree: int = 1
    activation_checkpointing: bool = False
    """true = each block keeps only its input and computes its inside again in the backward pass."""

    def check(self, path: str) -> None:
        for name in ("data_parallel_replicate_degree", "data_parallel_shard_degree"):
            value = getattr(self, name)
            if value != -1 and value < 1:
                raise UserError(f"{path}.{name} must be -1 or at least 1, got {value}", remedy=f"set {path}.{name}=-1")


@dataclass(frozen=True)
class ValidationSettings:
    every: int = 500
    """Steps between passes; 0 = never. The last step always validates when this is not 0."""
    batch_size: int | None = None
    max_samples_per_group: int | None = None
    num_noise_draws: int = 1
    metrics: tuple[Literal["action"], ...] = ()
    """What else a pass measures: `action` = the open-loop error of sampled action chunks, in the data's units."""
    max_action_samples: int = 32
    """Windows a (dataset, control_mode) that `action` samples: a fixed systematic sample."""
    num_action_plots: int = 4
    """Windows of the whole mixture that `action` draws, predicted against true."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """A window that can't be read: end the run with its name, or leave it out, count and name it."""
    best_margin: float | None = 2.0
    """Standard errors of the paired difference by which a pass must beat the best one to become
    `checkpoints/best`; null = no best checkpoint."""

    def check(self, path: str) -> None:
        _at_least(f"{path}.every", self.every, 0)
        for name in ("batch_size", "max_samples_per_group", "num_noise_draws", "max_action_samples"):
            _positive(f"{path}.{name}", getattr(self, name))
        _at_least(f"{path}.num_action_plots", self.num_action_plots, 0)
        _at_least(f"{path}.best_margin", self.best_margin, 0)


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
        _at_least(f"{path}.every", self.every, 0)
        _positive(f"{path}.keep_last", self.keep_last)
        _positive(f"{path}.keep_every", self.keep_every)


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


def load(tree: Mapping[str, Any]) -> Settings:
    """The typed settings of a composed, resolved configuration tree. Raises `UserError`."""
    if isinstance(tree.get("resume"), str):
        tree = {**tree, "resume": {"checkpoint": tree["resume"]}}
    return build(Settings, tree, "")
