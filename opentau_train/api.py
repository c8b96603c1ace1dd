"""The program from Python, in one process or in each of torchrun's:

    import opentau_train

    config = opentau_train.compose(["+recipe=lerobot", "data.sources.main.root=/data/my_dataset", "trainer.steps=100"])
    trained = opentau_train.train(config)
    policy = opentau_train.load_policy(trained.run_dir)

The package's own names lead here, and are imported when they are used. Mistakes are raised, as `UserError`.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from opentau_train import composing
from opentau_train.config.explain import explain
from opentau_train.data.decode.open_files import raise_file_limit
from opentau_train.errors import EXIT_OK, UserError
from opentau_train.sinks.jsonl import read_rows


@dataclass(frozen=True)
class Trained:
    """A run that `train` has left: its directory, and whether it came to its last step. Else it was stopped and saved,
    and `resume=auto` with the same `paths.run_dir` goes on."""

    run_dir: Path
    finished: bool

    def metrics(self) -> dict[int, dict[str, Any]]:
        """{step: {tag: number}}, what `metrics.jsonl` holds."""
        return read_rows(self.run_dir)


def compose(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration that `python -m opentau_train` with these `arguments` has, checked: a tree of dicts, lists and
    plain values, which may be changed before `train` gets it. Raises `UserError`."""
    try:
        tree = composing.compose(arguments)
        composing.checked(tree)
        return tree
    except (HydraException, OmegaConfBaseException, yaml.MarkedYAMLError) as error:
        raise explain(error) from error


def train(config: Mapping[str, Any]) -> Trained:
    """Train as a configuration of `compose` says, from this process's main thread: Ctrl-C saves and returns. Where
    torchrun has started several processes, each of them calls it, and `paths.run_dir` must be set.

    Raises `UserError` for mistakes in configuration or data, `Fault` for what the machine does.
    """
    tree: dict[str, Any] = copy.deepcopy(dict(config))
    settings = composing.checked(tree)
    if threading.current_thread() is not threading.main_thread():
        raise UserError("a training minds signals, which only the main thread can", remedy="call train there")
    from opentau_train import loop
    from opentau_train.checkpoints import place

    if settings.paths.run_dir is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = "set paths.run_dir=DIRECTORY, the same in all of them"
        raise UserError("several processes have no run directory in common", where="paths.run_dir", remedy=remedy)
    run_dir = place.run_dir_of(settings)
    tree["paths"] = {**tree.get("paths", {}), "run_dir": str(run_dir)}
    raise_file_limit()
    return Trained(run_dir, loop.run(composing.checked(tree), tree) == EXIT_OK)
