"""The settings of the data, `data` in `conf/`: the sources of the mixture, and how their windows become samples.

As all settings they are typed, frozen and checked when built; `config.Settings` is the whole that they are part of.
Torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from opentau_train.config.bounds import Count, Fraction, Natural, NotNegative, Positive, at_least, within
from opentau_train.config.modes import WITH_FUTURE, FutureSettings, Mode, ModeSettings
from opentau_train.config.resuming import NEW_PLAN, ON_RESUME, SAFE, Meaning, judged, refused, warned
from opentau_train.config.typed import TARGET, bind
from opentau_train.data.convention import Convention
from opentau_train.errors import UserError

TRANSFORMED = refused("the policy was trained on inputs and actions transformed otherwise")

CONVERTED = refused("the policy was trained on actions and state converted otherwise")


def _declared_otherwise(old: Any, new: Any, now: Mapping[str, Any]) -> Meaning:
    """What a change of a source's `convention` means: by itself it converts nothing."""
    wanted = any(now.get(f"data.convention.{vector}") is not None for vector in ("actions", "state"))
    return CONVERTED[ON_RESUME] if wanted else Meaning("safe")


MODE_ON_RESUME = warned("other losses supervise the source from here on")
HELD_OUT = warned("the held-out episodes themselves are compared")  # by data/mixture/split


@dataclass(frozen=True)
class SourceSettings:
    """One dataset of the mixture: `data.sources.NAME`. Its other keys are `options` of the class that `_target_` names.

    The settings in `SELECTING` are applied by that class, where it can; all the others by the mixture, for any class.
    """

    target: str = field(default="opentau_train.data.lerobot.LeRobotSource", metadata={"key": "_target_"})
    root: str | None = field(default=None, metadata=SAFE)  # what lies there is compared by itself (`data/order/state`)
    """Local directory of the dataset, or the URL of one on a server: s3://, gs://, hf://datasets/, http(s)://, ..."""
    repo_id: str | None = None
    """Hugging Face Hub name, downloaded once a node when `root` is null."""
    revision: str | None = None
    """A branch, tag or commit of `repo_id`; null = the newest."""
    weight: NotNegative | None = None
    """Share in the mixture relative to the other weights; null on all sources = every window once an epoch. 0 = its
    held-out episodes are validated, the others left out."""
    failure_weight: NotNegative = 0.0
    """Weight of `failure/`, where the directory holds LeRobot datasets `success/` and `failure/`."""
    val_split_ratio: Annotated[float, within(0.0, 1.0)] = field(default=0.1, metadata=HELD_OUT)
    """Share of the episodes held out, by hash of their number; 1.0 = the whole source is for validation only."""
    val_episodes: tuple[int, ...] | None = field(default=None, metadata=HELD_OUT)
    """The held-out episode numbers themselves, in place of `val_split_ratio`."""
    control_mode: str | None = None
    """joint, ee, mixed, ...; null = from info.json, else from `control_mode_column`, else 'default'."""
    control_mode_column: str = "control_mode"
    """Column of the episodes' metadata that says each one's control mode."""
    robot_type: str | None = None
    """Sources of one robot type and control mode are normalised together; null = from info.json."""
    mode: Mode = field(default="policy", metadata=MODE_ON_RESUME)
    """What the policy learns from the source's samples: one of `modes.MODES`, or `joint`, which draws one for each."""
    mode_probabilities: ModeSettings = field(default_factory=ModeSettings, metadata=MODE_ON_RESUME)
    chunk_length: Count | None = None
    """The source's own, at most `data.chunk_length`, to which it is padded."""
    sample_stride: Count | None = None
    """The source's own, in place of `data.sample_stride`."""
    fps: Positive | None = None
    """Rate of the action chunk and of the history, by time; null = the dataset's own rate."""
    use_filter_dict: bool = False
    """true = only windows in the ranges of frames that the file of `filter_dict_path` keeps."""
    filter_dict_path: str | None = field(default=None, metadata=SAFE)  # its content is compared by itself
    """A JSON file of ranges, such as DROID's keep_ranges: docs/data.md."""
    filter_key: str = "{recording_folderpath}--{file_path}"
    """An episode's key in the filter file, over its metadata. Where all keys of the file are whole numbers and no key
    that this makes is one, they are episode numbers."""
    filter_rule: Literal["start", "whole"] = "start"
    """What of a window must lie in a range: its first frame, or its whole chunk."""
    filter_min_match: Annotated[float, within(0.0, 1.0)] = field(default=0.5, metadata=SAFE)
    """Least fraction of the episodes that must be in the filter file."""
    filter_trim_tail: Natural | None = None
    """Frames to take off each range's end; null = the file's `metadata.filter_last_n_in_ranges`, else none."""
    iterable_shuffle: bool = True
    """false = the source's windows in the dataset's order, which trains badly: to look at data."""
    episodes: tuple[int, ...] | None = None
    """Only these episodes, by number; null = all."""
    exclude_episodes: tuple[int, ...] = ()
    """Without these."""
    success_only: bool = False
    """Only episodes that succeeded, as `success_column` tells."""
    success_column: str = "next.success"
    """The column that tells success: of the episodes' metadata, or of the rows, whose last one counts."""
    transforms: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=TRANSFORMED)
    """{name: {_target_, options}}: what is done to the dataset's columns and pictures first, in this order."""
    convention: Convention = field(default_factory=Convention, metadata=judged(_declared_otherwise))
    """What the dataset's own columns hold, before any transform."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})
    """The class's own options, by name, as they are given."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What the class is built from, as the tree that `typed.instantiate` takes."""
        return {TARGET: self.target, **self.options}

    @property
    def validates_only(self) -> bool:
        """Whether every episode is held out."""
        return self.val_split_ratio == 1.0 and self.val_episodes is None

    @property
    def modes(self) -> dict[str, float]:
        """{mode: the share of the source's samples that have it}, in the order of `MODES`."""
        return self.mode_probabilities.of(self.mode)

    @property
    def trains(self) -> bool:
        """Whether episodes that aren't held out are trained on."""
        return not self.validates_only and self.weight != 0

    def check(self, path: str) -> None:
        mixture = [f.metadata.get("key", f.name) for f in fields(self) if f.name != "options"]
        bind(self.arguments, path, (), mixture)
        self.mode_probabilities.check_for(self.mode, path)
        if self.validates_only and self.weight:
            raise UserError(
                f"{path} is for validation only (val_split_ratio=1.0) and has a weight, {self.weight:g}, to train with",
                where=f"{path}.weight",
                remedy=f"remove {path}.weight, or lower {path}.val_split_ratio",
            )
        if self.use_filter_dict and not self.filter_dict_path:
            raise UserError(
                f"{path}.use_filter_dict is true but {path}.filter_dict_path is not set",
                remedy=f"set {path}.filter_dict_path=FILE.json, or {path}.use_filter_dict=false",
            )


SELECTING = (
    *("control_mode", "control_mode_column", "robot_type"),
    *("use_filter_dict", "filter_dict_path", "filter_key", "filter_rule", "filter_min_match", "filter_trim_tail"),
    *("episodes", "exclude_episodes", "success_only", "success_column"),
)
"""Settings of a source that choose among its episodes and windows, or say what they are."""


@dataclass(frozen=True)
class DropoutSettings:
    """Probabilities to drop an optional input of a training sample; provenance is never dropped."""

    prompt: Fraction = 0.0
    """Of the instruction."""
    state: Fraction = 0.0
    """Of the state."""
    camera: Fraction = 0.0
    """Of each camera, drawn for each by itself."""

    def check(self, path: str) -> None: ...


@dataclass(frozen=True)
class BadSampleSettings:
    """When to stop because windows can't be read."""

    max_fraction: Fraction = 0.01
    """Share of the samples so far; more of them can't be read: the run ends."""
    grace: Natural = 16
    """Substitutions, over all ranks, before `max_fraction` counts."""

    def check(self, path: str) -> None: ...


@dataclass(frozen=True)
class CorrelationSettings:
    """How alike the gradients of two windows of one episode are, d frames apart: episode + neighbours exp(-d / frames).
    Only predicts the shuffle's quality (`data/order/quality.py`); `benchmarks/vif.py` measures it."""

    episode: Fraction = 0.1
    """Of any two windows of an episode."""
    neighbours: Fraction = 0.4
    """What neighbours have more than that."""
    frames: Positive = 8.0
    """After how many frames that has fallen to 1 / e."""

    def check(self, path: str) -> None:
        if self.episode + self.neighbours >= 1.0:
            raise UserError(
                f"{path}.episode + {path}.neighbours must be below 1, got {self.episode + self.neighbours:g}",
                remedy=f"lower one: a window's gradient has a part of its own; {path}.episode=0.1 is a cautious choice",
            )


@dataclass(frozen=True)
class DataSettings:
    """The mixture, the windows cut from it, and how they are loaded: `data`."""

    sources: dict[str, SourceSettings] = field(default_factory=dict, metadata=NEW_PLAN)
    builtin_sample: Literal["droid"] | None = field(default=None, metadata=NEW_PLAN)
    """The sample that stands in when no source has a root or repo_id."""
    image_size: tuple[int, int] = (96, 96)
    """(H, W) of every camera after resizing, aspect kept, padded with black."""
    scaling: Literal["area", "bilinear"] = field(
        default="bilinear", metadata=refused("the policy was trained on pictures that were scaled otherwise")
    )
    """How pictures are made smaller: each pixel the mean over its area (`area`, which conf/data/ chooses), or by
    triangles as wide (`bilinear`, what openpi's policies were trained on, and runs that don't say)."""
    chunk_length: Count = 16
    """Actions that a window holds, from its frame on."""
    history: Natural = 0
    """Earlier frames that a window holds of each camera."""
    future: FutureSettings = field(default_factory=FutureSettings)
    sample_stride: Count = field(default=1, metadata=NEW_PLAN)
    """Windows start every so many frames."""
    drop_tail: bool = field(default=False, metadata=NEW_PLAN)
    """true = only windows whose chunk lies wholly inside the episode."""
    state_dim: Count | None = None
    """null = the widest source; narrower ones are padded and masked."""
    action_dim: Count | None = None
    """As `state_dim`."""
    normalization: Literal["mean_std", "min_max", "quantiles"] = field(
        default="mean_std", metadata=refused("the policy was trained on inputs normalised otherwise")
    )
    """Of state and actions: by mean and deviation, or q01 and q99, or minimum and maximum to [-1, 1]."""
    normalization_per_timestep: bool = field(
        default=False, metadata=refused("the policy was trained on inputs normalised otherwise")
    )
    """true = statistics of their own for each step of the chunk, which suits deltas: they grow from step to step."""
    statistics_path: str | None = field(default=None, metadata=SAFE)
    """Statistics to normalise by in place of the data's own: a run, or openpi's norm_stats.json. A resume keeps its
    own."""
    convention: Convention = field(default_factory=Convention, metadata=CONVERTED)
    """What the policy is trained in: each source is converted to it from what it declares."""
    num_workers: Natural = field(default=2, metadata=SAFE)
    """Loader processes of a rank; 0 = its own. They change speed only."""
    prefetch_factor: Count = field(default=2, metadata=SAFE)
    """Batches that a worker prepares ahead."""
    max_samples_per_batch: Count | None = field(default=None, metadata=SAFE)
    """Most samples that a rank holds in one micro-batch; null = all of its share."""
    max_num_tokens_after_packing: int = field(default=-1, metadata=SAFE)
    """Most tokens in a rank's micro-batch, with model.packing=true; -1 = any number."""
    cache_gb: Positive = field(default=100.0, metadata=SAFE)
    """Gigabytes (1e9) that a node keeps of the sources whose root is a URL, at most."""
    lanes_per_sample: Count = field(default=4, metadata=NEW_PLAN)
    """Lanes of the tape, as a multiple of the global batch; more decorrelate more and open more decoders."""
    phase_rows: Count = field(default=1024, metadata=NEW_PLAN)
    """Rows of the tape between two cuts of the lanes."""
    expect_mode: str | None = field(default=None, metadata=SAFE)
    """The mode that all sources must have: what a recipe that is named for one says."""
    max_pixels: Count = field(default=50_000_000, metadata=SAFE)
    """Pictures of more pixels are refused before they are decoded, as windows that can't be read."""
    skip_loop_filter: bool = field(default=False, metadata=warned())
    """true = H.264 and HEVC are decoded without the smoothing between their blocks: 8 to 20% faster, and the less
    the pictures that were recorded the farther apart keyframes are."""
    video_decoder: Literal["cpu", "nvdec"] = field(default="cpu", metadata=SAFE)
    """nvdec = the rank's card decodes H.264, HEVC, VP9 and AV1, to the same pictures: for large ones, whose decoding
    the CPU's cores have no time for (docs/data.md)."""
    blank_images: bool = field(default=False, metadata=warned())
    """true = every image black: the ablation that shows what the images are worth."""
    transforms: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=TRANSFORMED)
    """{name: {_target_, options}}: made for every source after its own."""
    dropout: DropoutSettings = field(default_factory=DropoutSettings, metadata=warned())
    bad_samples: BadSampleSettings = field(default_factory=BadSampleSettings, metadata=SAFE)
    correlation: CorrelationSettings = field(default_factory=CorrelationSettings, metadata=SAFE)

    def check(self, path: str) -> None:
        if self.max_num_tokens_after_packing != -1:
            at_least(f"{path}.max_num_tokens_after_packing", self.max_num_tokens_after_packing, 1)
        for size in self.image_size:
            at_least(f"{path}.image_size", size, 8)
        if self.video_decoder == "nvdec" and not self.num_workers:
            raise UserError(
                f"{path}.video_decoder=nvdec and {path}.num_workers=0: a process that trains has a context on the card "
                "that decoders can't share",
                remedy=f"set {path}.num_workers=2",
            )
        for name, source in self.sources.items():
            key = f"{path}.sources.{name}.mode"
            if self.expect_mode not in (None, source.mode):
                raise UserError(
                    f"{key}={source.mode} in a recipe that is named for the mode {self.expect_mode}: under that name "
                    "samples of another mode would be trained on, and dilute its losses",
                    remedy=f"set {key}={self.expect_mode}, or choose another recipe; {path}.expect_mode=null trains it",
                )
            if not self.future.num_frames and set(source.modes) & set(WITH_FUTURE):
                what, remedy = f"and {path}.future.num_frames is 0", f"set {path}.future.num_frames=4"
                raise UserError(f"{key}={source.mode} learns with future frames, {what}", remedy=remedy)
