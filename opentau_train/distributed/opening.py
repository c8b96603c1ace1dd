"""The mixture opened by all ranks alike: files prepared once a node, statistics computed by all together."""

from __future__ import annotations

import hashlib
import logging
import os
from functools import partial

from opentau_train.config.settings import Settings
from opentau_train.data.mixture import statistics
from opentau_train.data.mixture.keyframes import with_keyframes
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.mixture.open import open_plan, row_digests, table_digests, with_statistics
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.data.mixture.team import Team, share_of_cores
from opentau_train.distributed.preflight import check_same
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World

log = logging.getLogger(__name__)

READING = "reading rows for the statistics"


def open_together(settings: Settings, world: World) -> Mixture:
    """The mixture as far as metadata tell it, opened by all ranks: files prepared once a node. Collective; raises
    `UserError` on all ranks alike."""
    num_nodes = max(world.num_nodes, int(os.environ.get("SLURM_NNODES", "1")))
    sources = resolve_sources(settings, world.once_a_node, num_nodes)
    plan = world.agree(lambda: open_plan(settings, sources))
    known = world.once_a_node(lambda: with_keyframes(plan, settings.paths.cache))
    if len(set(world.gather("".join(d.train.groups_digest for d in known.datasets)))) == 1:
        plan = known
    else:  # a node's cache may know the videos of a dataset on a server, from a copy
        log.warning("the nodes don't know the same of the videos' keyframes: lanes begin anywhere")
    _check_same_tables(plan, world)
    return plan


def normalise_together(
    plan: Mixture, settings: Settings, world: World, progress: Progress, stats: dict[str, HeadStats] | None = None
) -> Mixture:
    """The opened mixture with statistics, computed by all ranks where no checkpoint's `stats` are given; `progress` is
    told of the rows that they read. Collective; raises `UserError` on all ranks alike."""
    if stats is None:
        cores = share_of_cores(world.rank - world.local_rank, world.gather)
        tell = partial(progress.enter, READING, None)
        team = Team(world.rank, world.size, cores, world.gather, world.agree, tell)
        stats = world.broadcast(statistics.compute(settings, plan.datasets, plan.groups, team))
        progress.enter(Progress.part)
    return with_statistics(plan, stats)


def _check_same_tables(plan: Mixture, world: World) -> None:
    """All ranks have opened the same episodes, and of a few of them read the same rows. Raises `UserError` naming the
    rank and dataset that differ."""
    tables = table_digests(plan)
    if world.size > 1:
        tables |= world.agree(lambda: row_digests(plan))
    digest = hashlib.blake2b(repr(tables).encode(), digest_size=8).hexdigest()
    if len(set(world.gather(digest))) > 1:  # the same answer on all ranks; only now are the tables themselves sent
        remedy = "give every node the same files and filters of this dataset"
        check_same(world.gather(tables), "the episodes, windows and rows of the dataset", remedy)
