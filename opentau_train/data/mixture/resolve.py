"""Where the sources' files are: given directories, downloads, or the built-in sample."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

from opentau_train.config.data import SourceSettings
from opentau_train.config.settings import Settings
from opentau_train.data.builtin.droid import ensure_droid_sample
from opentau_train.distributed.world import World
from opentau_train.errors import UserError

log = logging.getLogger(__name__)


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

    assert source.repo_id is not None
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
