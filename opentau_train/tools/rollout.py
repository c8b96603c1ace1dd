"""The success rate of a trained policy in a simulator.

    python -m opentau_train.tools.rollout checkpoint=RUN env=metaworld task=reach-v3 [episodes=100] [out=DIR] [seed=0]
        [horizon=8] [simulators=4] [videos=2] [timeout=120] [device=auto] [norm_head=NAME] [base=PATH]
        [trust=[MODULE]] [env.KEY=VALUE ...] [--config-dir DIR]
    torchrun --nproc-per-node 4 -m opentau_train.tools.rollout checkpoint=RUN env=reach

`checkpoint`: what `load_policy` reads. Writes `rollout.json` (success rate with its 95 % interval, each episode's
outcome) and films of the first `videos` episodes to `out`, by default a folder `rollout_ENV_TASK` beside the
checkpoint's weights. The same arguments give the same episodes, on any number of processes.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 for what the machine does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from opentau_train import cli
from opentau_train.checkpoints.pretrained import pretrained_folder
from opentau_train.config.bounds import Count, positive
from opentau_train.distributed.world import launch
from opentau_train.errors import EXIT_OK, UserError, check_machine
from opentau_train.log import log_to
from opentau_train.simulation.environment import declared
from opentau_train.simulation.play import Played, Session, play, robot_for
from opentau_train.simulation.rollout import Rollouts
from opentau_train.simulation.success import in_words, success_row
from opentau_train.tools.environments import parse
from opentau_train.tools.options import answer
from opentau_train.validation.plots import save_png


@dataclass(frozen=True)
class Options:
    """The command line; see `Rollouts`."""

    env: str
    checkpoint: str
    out: str | None = None
    episodes: Count = 100
    seed: int = 0
    horizon: Count = 8
    simulators: Count = 4
    videos: int = 2
    timeout: Annotated[float, positive] = 120.0
    device: Literal["auto", "cpu"] = "auto"
    norm_head: str | None = None
    base: str | None = None
    trust: tuple[str, ...] = ()

    def check(self, path: str) -> None:
        """Each value is bounded by itself."""

    @property
    def rollouts(self) -> Rollouts:
        return Rollouts(self.episodes, self.seed, self.horizon, self.simulators, self.timeout, self.videos)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    return answer(__doc__, work, arguments)


def work(arguments: Sequence[str]) -> int:
    """Play, and write what came of it. Raises `UserError` on all ranks alike."""
    from opentau_train.deploy.policy import load_policy

    options, tree = parse(arguments, Options)
    name = "_".join(filter(None, [options.env, tree.get("task")]))
    environment = declared(tree, "env")
    identity = {"command": " ".join(arguments)}
    with (
        launch(device=options.device, precision="no", timeout=1800.0, identity=identity) as world,
        log_to(sys.stderr, world.is_main),
        world.roll_call(),
    ):
        policy = world.agree(
            lambda: load_policy(options.checkpoint, world.device, base=options.base, trust=options.trust)
        )
        robot = world.agree(lambda: robot_for(policy, environment, "env", options.norm_head))
        out = (
            Path(options.out) if options.out else pretrained_folder(Path(options.checkpoint)).parent / f"rollout_{name}"
        )
        played = play(name, tree, options.rollouts, policy, robot, Session(world))
        row = success_row(played.results, played.num_lost, name)
        if world.is_main:
            write(
                out.expanduser(),
                {"checkpoint": options.checkpoint, "env": tree, "ranks": world.size, "metrics": row},
                played,
            )
            print(in_words(row, name), out, sep="\n")
    return EXIT_OK


def write(out: Path, result: dict[str, Any], played: Played) -> None:
    """`rollout.json` and the films."""
    outcomes = [{"success": bool(s), "steps": int(n)} for s, n, _ in played.results.tolist()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "rollout.json").write_text(json.dumps({**result, "episodes": outcomes}, indent=1) + "\n")
        for film in played.films:
            (out / f"episode_{film.episode}.mp4").write_bytes(film.mp4)
            (out / f"episode_{film.episode}.gif").write_bytes(film.gif)
            save_png(out / f"episode_{film.episode}.png", film.strip)
    except OSError as error:
        check_machine(error, out)
        raise UserError(
            f"can't write {out}: {error}", where="out", remedy="name a directory that can be written"
        ) from error


if __name__ == "__main__":
    cli.end(main())
