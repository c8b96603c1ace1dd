"""Where the sources' files are: given directories, mirrors of servers', downloads, or the built-in sample."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from opentau_train.config.data import SourceSettings
from opentau_train.config.settings import Settings
from opentau_train.data.builtin.droid import ensure_droid_sample
from opentau_train.data.convention import Convention, Part
from opentau_train.data.lerobot.outcomes import by_outcome
from opentau_train.data.remote.mirror import is_url, make_mirror
from opentau_train.errors import Fault, UserError, check_machine

log = logging.getLogger(__name__)

_HAND = (
    Part("position", unit="m", reference="absolute"),
    Part("rotation", rotation="euler_xyz", unit="rad", reference="absolute"),
    Part("gripper", polarity="closed", range=(0.0, 1.0), reference="absolute"),
)
"""What the built-in sample has under ee control."""

T = TypeVar("T")


class OnceANode(Protocol):
    """Calls `make` on one process of each node first, then on the node's others: for files that one of them prepares.
    All processes call it alike."""

    def __call__(self, make: Callable[[], T]) -> T: ...


def alone(make: Callable[[], T]) -> T:
    """`OnceANode` where there is one process."""
    return make()


def resolve_sources(
    settings: Settings, once_a_node: OnceANode = alone, num_nodes: int = 1
) -> dict[str, SourceSettings]:
    """The sources to open, sorted by name, with local roots: given, mirrored or downloaded once a node, or the built-in
    sample's. A directory of datasets by outcome is several of them (`lerobot.outcomes`).

    Raises `UserError`, of the configuration on all processes alike.
    """
    sources = settings.data.sources
    if settings.data.builtin_sample and not any(s.root or s.repo_id for s in sources.values()):
        sources = _builtin_sample(settings, once_a_node, num_nodes)
    taken: dict[str, SourceSettings] = {}
    for name, source in sorted(sources.items()):
        located = _with_root(name, source, settings, once_a_node)
        if source.root and is_url(source.root):
            at_url = by_outcome(name, source, located.root)
            parts = {p: located if s is source else _with_root(p, s, settings, once_a_node) for p, s in at_url.items()}
        else:
            parts = by_outcome(name, located, located.root)
        twice = next((part for part in parts if part != name and part in sources), None)
        if twice is not None:
            raise UserError(
                f"data.sources.{twice} is what {name}'s directory, which holds success/ and failure/, adds itself",
                where=f"data.sources.{twice}",
                remedy=f"take it out, or give both sources their own: set data.sources.{name}.root={parts[name].root} "
                f"and data.sources.{twice}.root={parts[twice].root}",
            )
        taken.update(parts)
    return dict(sorted(taken.items()))


def _with_root(name: str, source: SourceSettings, settings: Settings, once_a_node: OnceANode) -> SourceSettings:
    if source.root and is_url(source.root):
        if source.target != SourceSettings.target:
            return source  # how it reads a URL is the class's own business
        return dataclasses.replace(source, root=once_a_node(lambda: _mirror(name, source, settings)))
    if source.root:
        return dataclasses.replace(source, root=str(Path(source.root).expanduser()))
    if source.repo_id:
        return dataclasses.replace(source, root=once_a_node(lambda: _download(name, source)))
    return source


def _download(name: str, source: SourceSettings) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    assert source.repo_id is not None
    try:
        return snapshot_download(source.repo_id, repo_type="dataset", revision=source.revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        check_machine(error)
        raise UserError(
            f"can't download dataset '{source.repo_id}': {str(error).splitlines()[0]}",
            where=f"data.sources.{name}.repo_id",
            remedy="check the name, the network and HF_HUB_OFFLINE, or give data.sources.NAME.root",
        ) from error


def _mirror(name: str, source: SourceSettings, settings: Settings) -> str:
    assert source.root is not None
    where = f"data.sources.{name}.root"
    if source.revision is not None:
        remedy = "write it into a URL of the Hub: root=hf://datasets/OWNER/NAME@REVISION"
        raise UserError("revision goes with repo_id, not with a URL", where=where, remedy=remedy)
    try:
        root = make_mirror(source.root, settings.paths.cache / "remote", int(settings.data.cache_gb * 1e9))
    except UserError as error:
        raise UserError(error.what, where=error.where or where, remedy=error.remedy) from error
    except Fault as error:
        raise UserError(error.what, where=where, remedy="check the URL, the network and the credentials") from error
    log.info("%s: %s is read through %s", where, source.root, root)
    return str(root)


def _builtin_sample(settings: Settings, once_a_node: OnceANode, num_nodes: int) -> dict[str, SourceSettings]:
    """The sources with the sample's two datasets in place of the unset one: `NAME` (joint control) and `NAME_ee` (ee
    control). Sources of other classes, which may need no files, stay."""
    if num_nodes > 1:
        raise UserError(
            f"DROID_ROOT is not set, and {num_nodes} nodes would train on the built-in sample",
            where="data.builtin_sample",
            remedy="export DROID_ROOT=PATH of the real dataset (or set data.sources.NAME.root)",
        )
    line = "no dataset is configured: training on the BUILT-IN DROID SAMPLE (set DROID_ROOT=PATH for the real one)"
    log.warning("%s\n  %s\n%s", "=" * (len(line) + 4), line, "=" * (len(line) + 4))
    roots = once_a_node(lambda: ensure_droid_sample(settings.paths.cache))
    others = {n: s for n, s in settings.data.sources.items() if s.target != SourceSettings.target}
    name, source = next((n, s) for n, s in settings.data.sources.items() if n not in others)
    held_out = max(source.val_split_ratio, 0.15)  # a hundredth of 16 episodes would be one
    options = {
        "state": ("observation.state.cartesian_position", "observation.state.gripper_position"),
        "actions": ("action.cartesian_position", "action.gripper_position"),
    }
    declared = Convention(_HAND, _HAND) if source.convention != Convention() else Convention()
    ee = dataclasses.replace(source, control_mode="ee", convention=declared, options={**source.options, **options})
    return {
        **others,
        name: dataclasses.replace(source, root=str(roots["joint"]), val_split_ratio=held_out),
        f"{name}_ee": dataclasses.replace(ee, root=str(roots["ee"]), val_split_ratio=held_out),
    }
