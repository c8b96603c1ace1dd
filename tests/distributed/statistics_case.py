"""Run by torchrun on two ranks: statistics that they compute together, of good rows, of broken ones, and until one of
them is killed in the middle."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opentau_train import cli
from opentau_train.config.settings import Settings, load_settings
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.data.mixture import statistics, tally, team
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.distributed.opening import normalise_together, open_together
from opentau_train.distributed.stopping import stop_signals
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World, launch
from opentau_train.errors import EXIT_FAULT, Fault, UserError


class Dying(LeRobotDataset):
    def columns(self, positions):
        for number, episode in enumerate(super().columns(positions)):
            if os.environ["RANK"] == "1" and number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield episode


def main(root: Path) -> None:
    team.PART_ROWS, tally.BLOCK_ROWS = 40, 10
    with launch(device="cpu", precision="no", timeout=60.0, identity={}) as world, stop_signals():
        words = [f"data.sources.main.root={root}", f"paths.cache_dir={root.parent / 'cache'}"]
        settings = load_settings(cli.compose(["+recipe=lerobot", *words]))
        plan = open_together(settings, world)
        together = normalise_together(plan, settings, world, Progress()).stats
        alone = statistics.compute(apart(settings, world), plan.datasets, plan.groups, team.Team())
        tell(world, f"the same: {text(together) == text(alone)}")
        shutil.rmtree(root.parent / "cache", ignore_errors=True)
        with broken(sorted((root / "data").rglob("*.parquet"))[3], world):
            try:
                normalise_together(plan, settings, world, Progress())
            except UserError as error:
                tell(world, f"{error.what.partition(':')[0]}, {error.where}")
        dying = (dataclasses.replace(d, source=Dying(**vars(d.source))) for d in plan.datasets)
        plan = dataclasses.replace(plan, datasets=tuple(dying))
        try:
            with world.roll_call():
                normalise_together(plan, settings, world, Progress())
        except Fault as fault:
            tell(world, fault.what.partition(":")[0])
            os._exit(EXIT_FAULT)


@contextmanager
def broken(path: Path, world: World) -> Iterator[None]:
    """Inside, half of the file is gone."""
    content = path.read_bytes()
    half = len(content) // 2
    world.barrier()
    if world.is_main:
        path.write_bytes(content[:4] + bytes(half) + content[4 + half :])
    world.barrier()
    yield
    if world.is_main:
        path.write_bytes(content)
    world.barrier()


def apart(settings: Settings, world: World) -> Settings:
    own = dataclasses.replace(settings.paths, cache_dir=f"{settings.paths.cache_dir} {world.rank}")
    return dataclasses.replace(settings, paths=own)


def text(stats: dict[str, HeadStats]) -> str:
    return json.dumps({head: of.to_json() for head, of in stats.items()})


def tell(world: World, words: str) -> None:
    sys.stdout.write(f"rank {world.rank}: {words}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
