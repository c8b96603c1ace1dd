"""From settings to a mixture. Every mistake in the data's settings that its metadata can reveal is raised here."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.config.data import SELECTING, DataSettings, SourceSettings
from opentau_train.config.modes import WITH_FUTURE
from opentau_train.config.settings import Settings
from opentau_train.config.typed import instantiate
from opentau_train.data import keep_ranges
from opentau_train.data.chunk import chunk_rows, row_step
from opentau_train.data.conventions.sources import check_parts, convert
from opentau_train.data.mixture import heads, normalize, statistics, team
from opentau_train.data.mixture.groups import groups_of, with_shares
from opentau_train.data.mixture.keyframes import with_keyframes
from opentau_train.data.mixture.mixture import Dataset, Mixture
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.data.mixture.split import held_out_error, must_be_whole, ranges, validation_split
from opentau_train.data.order.blocks import draws_per_epoch, make_blocks
from opentau_train.data.source import Source, SourceOptions
from opentau_train.data.transforms.base import Transform
from opentau_train.data.transforms.drop import BlankImages, DropInputs
from opentau_train.data.transforms.pipeline import Pipeline, compose, with_fields
from opentau_train.data.transforms.shape import ChoosePrompt, Pad
from opentau_train.errors import UserError, did_you_mean
from opentau_train.types import BatchSpec, Group

log = logging.getLogger(__name__)

COMPARED = 2
"""Episodes of each dataset whose rows all ranks compare."""


def open_mixture(settings: Settings, stats: dict[str, HeadStats] | None = None) -> Mixture:
    """The mixture of the settings, in one process: every source opened, split, grouped and normalised, by `stats` (a
    checkpoint's) or by statistics computed now.

    What several processes do together is in `distributed/opening.py`, of the same parts. Raises
    `UserError`.
    """
    mixture = with_keyframes(open_plan(settings, resolve_sources(settings)), settings.paths.cache)
    if stats is None:
        stats = statistics.compute(settings, mixture.datasets, mixture.groups, team.alone())
    return with_statistics(mixture, stats)


def open_plan(settings: Settings, sources: dict[str, SourceSettings]) -> Mixture:
    """The mixture of the resolved `sources` as far as metadata tell it: it has a tape and its datasets, but no
    statistics, so no samples. Raises `UserError`."""
    data = settings.data
    datasets: list[Dataset] = []
    groups: list[Group] = []
    several = len({mode for source in sources.values() for mode in source.modes}) > 1
    for name in sources:
        dataset = _open_dataset(len(datasets), name, sources, settings, first_group=len(groups))
        datasets.append(dataset)
        groups += groups_of(dataset.source, dataset.settings.modes if several else ("",))
    check_parts(data.convention, [d.conversions for d in datasets])
    _warn_of_rates(datasets)
    spec = _batch_spec(data, datasets, groups)
    return _drawn(Mixture(data, settings.seed, tuple(datasets), (), tuple(groups), {}, (), spec))


def _drawn(mixture: Mixture) -> Mixture:
    """The mixture with its datasets' draws, and the shares of its groups."""
    datasets = mixture.datasets
    draws = draws_per_epoch([d.train.num_windows for d in datasets], [d.settings.weight for d in datasets])
    groups = with_shares(mixture.groups, datasets, draws)
    return dataclasses.replace(mixture, draws=tuple(draws), groups=tuple(groups))


def _pipelines(mixture: Mixture, stats: dict[str, HeadStats]) -> tuple[Pipeline, ...]:
    """Each dataset's transforms: its own, then those that all have, in this order."""
    made, data, spec = [], mixture.settings, mixture.spec
    for dataset in mixture.datasets:
        norm_heads = (mixture.groups[g].norm_head for g in np.unique(dataset.group_of))
        heads = {head: stats[head] for head in norm_heads}
        dims = dict.fromkeys(heads, (len(dataset.state_names), len(dataset.action_names)))
        shared: dict[str, Transform] = {
            "choose_prompt": ChoosePrompt(),
            "normalize": normalize.normalizer(heads, data.normalization),
            "pad": Pad(spec.state_dim, spec.action_dim, spec.chunk_length, dims),
        }
        if any(dataclasses.astuple(data.dropout)):
            shared["drop_inputs"] = DropInputs(**dataclasses.asdict(data.dropout))
        if data.blank_images:
            shared["blank_images"] = BlankImages()
        made.append(Pipeline({**dataset.transforms, **shared}))
    return tuple(made)


def with_statistics(mixture: Mixture, stats: dict[str, HeadStats]) -> Mixture:
    """The mixture normalised by `stats`, without the episodes whose rows these didn't find; logs which they are, and
    which dimensions don't vary. Raises `UserError` where the statistics don't fit."""
    heads.check(stats, mixture.datasets, mixture.groups)
    mixture = _without(mixture, {episode for known in stats.values() for episode in known.left_out})
    for head, known in stats.items():
        flat = normalize.constant_dimensions(known, mixture.settings.normalization)
        rare = normalize.rare_dimensions(known, mixture.settings.normalization)
        for names, what in ((flat, "constant, left at zero"), (rare, "by min and max, since q01 is q99")):
            if names:
                log.warning("norm head %s: %s: %s", head, what, ", ".join(names))
    return dataclasses.replace(mixture, stats=stats, pipelines=_pipelines(mixture, stats))


def _without(mixture: Mixture, left_out: set[tuple[str, int]]) -> Mixture:
    """The mixture without windows of the episodes (dataset, number) in `left_out`."""
    if not left_out:
        return mixture
    datasets = []
    for dataset in mixture.datasets:
        numbers = sorted(number for name, number in left_out if name == dataset.name)
        if numbers:
            where = f"data.sources.{dataset.name}"
            log.warning("%s: left out, their rows not being there: episodes %s", where, ranges(numbers))
        sides = dataset.train.without(numbers), dataset.validation.without(numbers)
        datasets.append(dataclasses.replace(dataset, train=sides[0], validation=sides[1]))
    return _drawn(dataclasses.replace(mixture, datasets=tuple(datasets)))


def table_digests(mixture: Mixture) -> dict[str, str]:
    """{dataset: a hash of its episodes and windows}: the same in all processes that read the same files."""
    return {
        f"dataset '{d.name}'": f"{d.train.digest()} {d.train.groups_digest} {d.validation.digest()}"
        for d in mixture.datasets
    }


def row_digests(mixture: Mixture) -> dict[str, str]:
    """{dataset: a hash of all rows of the few episodes that a key chooses}: files may have other contents though their
    metadata are the same."""
    digests = {}
    for d in mixture.datasets:
        keys = rng.fold(rng.key(mixture.seed, "rows", d.name), d.source.episodes.episode_index)
        digest = hashlib.blake2b(digest_size=8)
        for position, state, actions in d.source.columns(np.sort(np.argsort(keys, kind="stable")[:COMPARED])):
            digest.update(repr((position, state.shape, actions.shape)).encode() + state.tobytes() + actions.tobytes())
        digests[f"rows of dataset '{d.name}'"] = digest.hexdigest()
    return digests


def open_source(name: str, settings: SourceSettings) -> Source:
    """The dataset of `data.sources.NAME`, its files being where `settings.root` says. Raises `UserError`."""
    where = f"data.sources.{name}"
    options: SourceOptions = instantiate(settings.arguments, where)
    if not options.selects:
        unset = SourceSettings()
        key = next((key for key in SELECTING if getattr(settings, key) != getattr(unset, key)), None)
        if key is not None:
            raise UserError(
                f"{settings.target} doesn't follow {where}.{key}",
                where=f"{where}.{key}",
                remedy="leave it out, or let the class's `open` follow it and say so with `selects = True`",
            )
    return options.open(name, settings)


def _open_dataset(
    index: int, name: str, sources: dict[str, SourceSettings], settings: Settings, first_group: int
) -> Dataset:
    """The dataset `name`, the `index`-th of the mixture; its groups are numbered from `first_group` on."""
    chosen = sources[name]
    data = settings.data
    chunk_length = chosen.chunk_length or data.chunk_length
    stride = chosen.sample_stride or data.sample_stride
    chosen = dataclasses.replace(chosen, chunk_length=chunk_length, sample_stride=stride)
    source = open_source(name, chosen)
    table = source.episodes
    held_out = validation_split(name, table.episode_index, chosen.val_split_ratio, settings.seed, chosen.val_episodes)
    rows, made_of = chunk_rows(chunk_length, row_step(source.fps, chosen.fps)), _made_of(source, chosen)
    cut = partial(make_blocks, name, table, source.get_shuffle_blocks(), rows=rows, stride=stride, made_of=made_of)
    parts = ~held_out & (chosen.weight != 0), held_out
    sides = [cut(keep, drop_tail=data.drop_tail, shuffle=chosen.iterable_shuffle) for keep in parts]
    _check_usable(source, chosen, sides[0].num_windows, held_out, data.drop_tail)
    if must_be_whole(settings.validation):
        _check_held_out(source, chosen, held_out)
    converted = convert(source, chosen, data.convention)
    given, names = (chosen.transforms, data.transforms), (converted.state_names, converted.action_names)
    path = f"data.sources.{name}.transforms"
    transforms, state_names, action_names = compose(given, *names, path, converted.transforms)
    repo_id = chosen.repo_id or Path(chosen.root or name).name
    twins = [n for n, s in sources.items() if (s.repo_id or Path(s.root or n).name) == repo_id]
    return Dataset(
        index=index,
        name=name,
        repo_id=repo_id if len(twins) == 1 else f"{repo_id}@{name}",
        settings=chosen,
        source=source,
        chunk_length=chunk_length,
        held_out=held_out,
        train=sides[0],
        validation=sides[1],
        group_of=first_group + len(chosen.modes) * np.unique(table.control_mode, return_inverse=True)[1],
        conversions=converted,
        transforms=transforms,
        state_names=state_names,
        action_names=action_names,
    )


def _check_usable(
    source: Source, chosen: SourceSettings, num_windows: int, held_out: NDArray[np.bool_], drop_tail: bool
) -> None:
    """Raises `UserError` where nothing is left to train on; warns of what trains or validates badly."""
    name, length = source.name, source.episodes.length
    if num_windows == 0 and chosen.trains:
        raise UserError(
            f"dataset '{name}' has no training window: {len(length)} episodes, longest {length.max(initial=0)} "
            f"frames, chunk_length {chosen.chunk_length}, drop_tail {drop_tail}",
            where=f"data.sources.{name}",
            remedy="loosen its filters, chunk_length or drop_tail; for validation only set val_split_ratio=1.0",
        )
    if not held_out.any() and chosen.val_split_ratio > 0 and chosen.trains:
        log.warning("data.sources.%s has one episode, which is trained on: it has no validation", name)
    if not chosen.iterable_shuffle:
        log.warning(
            "data.sources.%s.iterable_shuffle=false: consecutive windows of one episode share a batch, so its "
            "gradients are correlated and their norm unstable; for debugging only",
            name,
        )


def _check_held_out(source: Source, chosen: SourceSettings, held_out: NDArray[np.bool_]) -> None:
    """Raises `UserError` where a video of a held-out episode is missing: validation replaces no window."""
    lacking = source.episodes.lacking
    if lacking is None or not (lacking & held_out).any():
        return
    numbers = source.episodes.episode_index
    excluded = [*chosen.exclude_episodes, *numbers[lacking].tolist()]
    raise held_out_error(source.name, "video", numbers[lacking & held_out].tolist(), excluded)


def _made_of(source: Source, chosen: SourceSettings) -> dict[str, str]:
    """The files that a dataset's blocks follow from, each as a short hash: a resume compares them to say what has
    changed. The settings that they follow from are compared by themselves (`config/drift`)."""
    path = Path(chosen.filter_dict_path or "").expanduser()
    return {
        "filter": keep_ranges.file_digest(path)[:12] if chosen.use_filter_dict else "",
        "files": hashlib.blake2b(source.fingerprint.encode(), digest_size=6).hexdigest(),
    }


def _warn_of_rates(datasets: list[Dataset]) -> None:
    """A chunk of T rows is another span of time at another rate: that must not pass unnoticed."""
    rates = {d.name: d.settings.fps or d.source.fps for d in datasets}
    if len(set(rates.values())) > 1:
        log.warning(
            "the datasets' action chunks have different rates (%s): set data.sources.NAME.fps to resample them by time",
            ", ".join(f"{name}: {rate:g} fps" for name, rate in rates.items()),
        )


def _batch_spec(data: DataSettings, datasets: list[Dataset], groups: list[Group]) -> BatchSpec:
    state_dim = _padded_dim("state_dim", data.state_dim, [(d.name, len(d.state_names)) for d in datasets])
    action_dim = _padded_dim("action_dim", data.action_dim, [(d.name, len(d.action_names)) for d in datasets])
    cameras = tuple(sorted({c for d in datasets for c in d.source.cameras}))
    heads = tuple(dict.fromkeys(g.norm_head for g in groups))
    modes = tuple(dict.fromkeys(mode for d in datasets for mode in d.settings.modes))
    shape = data.image_size, data.history, state_dim, action_dim, max(d.chunk_length for d in datasets)
    seen = _future_cameras(data, datasets, cameras) if data.future.num_frames else ()
    future = data.future.num_frames, data.future.stride, seen
    spec = BatchSpec(cameras, *shape, heads, modes, *future, data.scaling)
    return with_fields(spec, (transform for d in datasets for transform in d.transforms.values()))


def _future_cameras(data: DataSettings, datasets: list[Dataset], cameras: tuple[str, ...]) -> tuple[str, ...]:
    """Those that `data.future` chooses. Raises `UserError` for one that isn't there, and for a dataset that has none of
    them and a mode that learns with future frames."""
    where, chosen = "data.future.cameras", cameras if data.future.cameras is None else data.future.cameras
    for camera in set(chosen) - set(cameras):
        near = did_you_mean(camera, cameras)
        raise UserError(f"no source has the camera '{camera}'{near}", where=where, remedy=f"set {where}=null")
    for d in datasets:
        if set(d.settings.modes) & set(WITH_FUTURE) and not set(chosen) & set(d.source.cameras):
            raise UserError(
                f"dataset '{d.name}' has a mode with future frames, and no camera for them",
                where=where,
                remedy=f"set {where}=null" if d.source.cameras else f"set data.sources.{d.name}.mode=policy",
            )
    return tuple(camera for camera in cameras if camera in chosen)


def _padded_dim(key: str, wanted: int | None, dims: list[tuple[str, int]]) -> int:
    name, widest = max(dims, key=lambda pair: pair[1])
    if wanted is not None and wanted < widest:
        raise UserError(
            f"data.{key}={wanted} is narrower than dataset '{name}', which has {widest} dimensions",
            remedy=f"set data.{key}={widest} or more, or null for the widest",
        )
    return wanted or widest
