"""The mixture: named sources opened, split, grouped and normalised, and the samples they give.

`Mixture.open` is where configuration meets data: every mistake that a look at the metadata can find ends here.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opentau_train.config import DataSettings, Settings, SourceSettings
from opentau_train.data import normalize, windows
from opentau_train.data.droid_sample import ensure_droid_sample
from opentau_train.data.normalize import Affine, HeadStats
from opentau_train.data.source import Source
from opentau_train.data.tape import DatasetBlocks, Tape, draws_per_epoch
from opentau_train.distributed import World
from opentau_train.errors import UserError
from opentau_train.metrics import Group
from opentau_train.typed import locate
from opentau_train.types import BatchSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A source in its place: its settings, its split and its blocks of either side.

    `repo_id` is the deduplicated mixture-level name; `group_of` [E] i64 the group of each episode of its table.
    """

    index: int
    name: str
    repo_id: str
    settings: SourceSettings
    source: Source
    chunk_length: int
    held_out: NDArray[np.bool_]
    train: DatasetBlocks
    validation: DatasetBlocks
    group_of: NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """All datasets, in the order of the configuration's names sorted, so that permuting a config changes nothing.

    `draws` n_d windows an epoch; `groups` (dataset, control_mode); `affine` {norm head: (state, actions)}.
    """

    settings: DataSettings
    seed: int
    datasets: tuple[Dataset, ...]
    draws: tuple[int, ...]
    groups: tuple[Group, ...]
    stats: dict[str, HeadStats]
    affine: dict[str, tuple[Affine, Affine]]
    spec: BatchSpec

    def tape(self, batch_size: int) -> Tape:
        """The plan of the training stream for a global batch of `batch_size` samples."""
        return Tape(
            [d.train for d in self.datasets],
            list(self.draws),
            seed=self.seed,
            batch_size=batch_size,
            lanes_per_sample=self.settings.lanes_per_sample,
            phase_rows=self.settings.phase_rows,
        )


def open_mixture(settings: Settings, world: World, stats: dict[str, HeadStats] | None = None) -> Mixture:
    """Open every source, split, group and normalise. `stats` (a checkpoint's) replace computing them.

    Collective: statistics are computed on rank 0 and broadcast. Raises `UserError` on all ranks alike.
    """
    sources = resolve_sources(settings, world)
    datasets, groups = world.agree(lambda: _open_datasets(settings, sources))
    if stats is None:
        stats = world.broadcast(world.agree(lambda: _statistics(settings, datasets, groups) if world.is_main else {}))
    _check_stats(stats, datasets, groups)
    data = settings.data
    if world.is_main:
        for head, found in stats.items():
            flat = normalize.constant_dimensions(found, data.normalization)
            if flat:
                log.warning("norm head %s: constant, left at zero: %s", head, ", ".join(flat))
    affine = {
        head: (Affine.of(s.state, data.normalization), Affine.of(s.actions, data.normalization))
        for head, s in stats.items()
    }
    draws = draws_per_epoch([d.train.num_windows for d in datasets], [d.settings.weight for d in datasets])
    groups = _with_shares(groups, datasets, draws)
    spec = _batch_spec(data, datasets)
    return Mixture(data, settings.seed, tuple(datasets), tuple(draws), tuple(groups), stats, affine, spec)


# -- sources ---------------------------------------------------------------------------------------------------------


def resolve_sources(settings: Settings, world: World) -> dict[str, SourceSettings]:
    """The sources to open, each with a local root: given, downloaded once a node, or the built-in sample's."""
    data = settings.data
    if data.builtin_sample and not any(s.root or s.repo_id for s in data.sources.values()):
        return _builtin_sample(settings, world)
    return {name: _with_root(name, source, world) for name, source in sorted(data.sources.items())}


def _with_root(name: str, source: SourceSettings, world: World) -> SourceSettings:
    if source.root:
        return dataclasses.replace(source, root=str(Path(source.root).expanduser()))
    if not source.repo_id:
        raise UserError(
            f"data.sources.{name} has neither root nor repo_id",
            where=f"data.sources.{name}",
            remedy=f"set data.sources.{name}.root=PATH or data.sources.{name}.repo_id=OWNER/NAME",
        )
    return dataclasses.replace(source, root=world.once_a_node(lambda: _download(name, source)))


def _download(name: str, source: SourceSettings) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return snapshot_download(source.repo_id, repo_type="dataset", revision=source.revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"can't download dataset '{source.repo_id}': {str(error).splitlines()[0]}",
            where=f"data.sources.{name}.repo_id",
            remedy="check the name, the network and HF_HUB_OFFLINE, or give data.sources.NAME.root",
        ) from error


def _builtin_sample(settings: Settings, world: World) -> dict[str, SourceSettings]:
    """The sample's two datasets in place of the unset source: `NAME` (joint control) and `NAME_ee` (ee control)."""
    nodes = max(world.num_nodes, int(os.environ.get("SLURM_NNODES", "1")))
    if nodes > 1:
        raise UserError(
            f"DROID_ROOT is not set, and {nodes} nodes would train on the built-in sample",
            where="data.builtin_sample",
            remedy="export DROID_ROOT=PATH of the real dataset (or set data.sources.NAME.root)",
        )
    if world.is_main:
        line = "no dataset is configured: training on the BUILT-IN DROID SAMPLE (set DROID_ROOT=PATH for the real one)"
        log.warning("%s\n  %s\n%s", "=" * (len(line) + 4), line, "=" * (len(line) + 4))
    roots = world.once_a_node(lambda: ensure_droid_sample(settings.paths.cache))
    name, source = next(iter(settings.data.sources.items()))
    held_out = max(source.val_split_ratio, 0.15)  # a hundredth of 16 episodes would be one
    ee = dataclasses.replace(
        source,
        state=("observation.state.cartesian_position", "observation.state.gripper_position"),
        actions=("action.cartesian_position", "action.gripper_position"),
        control_mode="ee",
    )
    return {
        name: dataclasses.replace(source, root=str(roots["joint"]), val_split_ratio=held_out),
        f"{name}_ee": dataclasses.replace(ee, root=str(roots["ee"]), val_split_ratio=held_out),
    }


# -- datasets and groups ---------------------------------------------------------------------------------------------


def _open_datasets(settings: Settings, sources: dict[str, SourceSettings]) -> tuple[list[Dataset], list[Group]]:
    groups: list[Group] = []
    datasets = [
        _open_dataset(index, name, source, sources, settings, groups)
        for index, (name, source) in enumerate(sources.items())
    ]
    return datasets, groups


def _open_dataset(
    index: int,
    name: str,
    chosen: SourceSettings,
    sources: dict[str, SourceSettings],
    settings: Settings,
    groups: list[Group],
) -> Dataset:
    data = settings.data
    source: Source = locate(chosen.target, f"data.sources.{name}").open(name, chosen, Path(chosen.root or ""))
    table = source.episodes
    held_out = windows.validation_split(name, table.episode_index, chosen.val_split_ratio, settings.seed)
    chunk_length = chosen.chunk_length or data.chunk_length
    blocks = source.get_shuffle_blocks()
    sides = [
        windows.make_blocks(
            name,
            table,
            blocks,
            keep,
            chunk_length=chunk_length,
            drop_tail=data.drop_tail,
            shuffle=chosen.iterable_shuffle,
        )
        for keep in (~held_out, held_out)
    ]
    if sides[0].num_windows == 0:
        raise UserError(
            f"dataset '{name}' has no training window: {len(table)} episodes, longest {table.length.max(initial=0)} "
            f"frames, chunk_length {chunk_length}, drop_tail {data.drop_tail}",
            where=f"data.sources.{name}",
            remedy="loosen its filters, chunk_length, drop_tail or val_split_ratio",
        )
    group_of = np.zeros(len(table), np.int64)
    for code in np.unique(table.control_mode):
        mode = table.control_modes[code]
        group_of[table.control_mode == code] = len(groups)
        groups.append(Group(name, mode, f"{source.robot_type}::{mode}", share=0.0))
    if not chosen.iterable_shuffle:
        log.warning(
            "data.sources.%s.iterable_shuffle=false: consecutive windows of one episode share a batch, so its "
            "gradients are correlated and their norm unstable; for debugging only",
            name,
        )
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
        group_of=group_of,
    )


def _with_shares(groups: list[Group], datasets: list[Dataset], draws: list[int]) -> list[Group]:
    """Groups with their share of the mixture: the dataset's draws, split by the group's training windows."""
    share = np.zeros(len(groups))
    for dataset, drawn in zip(datasets, draws, strict=True):
        by_group = np.bincount(
            dataset.group_of[dataset.train.episode], weights=dataset.train.length, minlength=len(groups)
        )
        share += drawn / sum(draws) * by_group / by_group.sum()
    # A group whose episodes are all held out has no training share; it still has a place in the aggregate.
    floor = 1.0 / max(1, sum(draws))
    return [dataclasses.replace(g, share=float(max(s, floor))) for g, s in zip(groups, share, strict=True)]


def _batch_spec(data: DataSettings, datasets: list[Dataset]) -> BatchSpec:
    state_dim = _padded_dim("state_dim", data.state_dim, [(d.name, len(d.source.state_names)) for d in datasets])
    action_dim = _padded_dim("action_dim", data.action_dim, [(d.name, len(d.source.action_names)) for d in datasets])
    return BatchSpec(
        cameras=tuple(sorted({c for d in datasets for c in d.source.cameras})),
        image_size=data.image_size,
        history=data.history,
        state_dim=state_dim,
        action_dim=action_dim,
        chunk_length=max(d.chunk_length for d in datasets),
    )


def _padded_dim(key: str, wanted: int | None, dims: list[tuple[str, int]]) -> int:
    name, widest = max(dims, key=lambda pair: pair[1])
    if wanted is not None and wanted < widest:
        raise UserError(
            f"data.{key}={wanted} is narrower than dataset '{name}', which has {widest} dimensions",
            remedy=f"set data.{key}={widest} or more, or null for the widest",
        )
    return wanted or widest


# -- statistics ------------------------------------------------------------------------------------------------------


def _statistics(settings: Settings, datasets: list[Dataset], groups: list[Group]) -> dict[str, HeadStats]:
    """{norm head: statistics} over all training episodes of the datasets that share the head."""
    heads: dict[str, HeadStats] = {}
    for head in sorted({g.norm_head for g in groups}):
        members = [d for d in datasets if any(groups[g].norm_head == head for g in np.unique(d.group_of))]
        positions = [np.flatnonzero(_in_head(d, groups, head) & ~d.held_out) for d in members]
        if not any(map(len, positions)):  # only held-out episodes: better theirs than none
            positions = [np.flatnonzero(_in_head(d, groups, head)) for d in members]
        first = members[0].source
        for other in members[1:]:
            if len(other.source.action_names) != len(first.action_names) or len(other.source.state_names) != len(
                first.state_names
            ):
                raise UserError(
                    f"datasets '{members[0].name}' and '{other.name}' share norm head {head} but not dimensions",
                    where=f"data.sources.{other.name}",
                    remedy=f"set data.sources.{other.name}.robot_type or control_mode to tell them apart",
                )
        identity = [
            part
            for d, p in zip(members, positions, strict=True)
            for part in (
                d.name,
                d.source.fingerprint,
                repr(d.source.state_names + d.source.action_names),
                repr(p.tolist()),
            )
        ]

        def rows(members=members, positions=positions):
            for d, chosen in zip(members, positions, strict=True):
                for place, state, actions in d.source.columns(chosen):
                    yield d.name, int(d.source.episodes.episode_index[place]), state, actions

        num_rows = sum(int(d.source.episodes.length[p].sum()) for d, p in zip(members, positions, strict=True))
        heads[head] = normalize.cached(
            settings.paths.cache,
            identity,
            lambda rows=rows, num=num_rows, first=first: normalize.compute(
                rows(), num, first.state_names, first.action_names
            ),
        )
    return heads


def _in_head(dataset: Dataset, groups: list[Group], head: str) -> NDArray[np.bool_]:
    return np.array([groups[g].norm_head == head for g in dataset.group_of], bool)


def _check_stats(stats: dict[str, HeadStats], datasets: list[Dataset], groups: list[Group]) -> None:
    for dataset in datasets:
        for g in np.unique(dataset.group_of):
            head = groups[g].norm_head
            found = stats.get(head)
            if found is None or len(found.action_names) != len(dataset.source.action_names):
                raise UserError(
                    f"the checkpoint has no statistics for norm head {head} "
                    f"with {len(dataset.source.action_names)} action dimensions",
                    where=f"data.sources.{dataset.name}",
                    remedy=f"it knows: {', '.join(sorted(stats))}; set robot_type and control_mode to one of these",
                )
