"""The command line of the tools that simulate: KEY=VALUE of their own, env=NAME for a file of conf/simulation/,
env.KEY=VALUE for one of its keys, `--config-dir DIR` for files of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import yaml

from opentau_train import cli
from opentau_train.config import typed
from opentau_train.errors import UserError

T = TypeVar("T")


def parse(arguments: Sequence[str], options: type[T]) -> tuple[T, dict[str, Any]]:
    """(the tool's own `options`, a dataclass; the tree of the environment that env=NAME names). `task=NAME` is short
    for env.task=NAME. Raises `UserError`, and Hydra's errors, which `cli.answer` explains."""
    own: dict[str, Any] = {}
    environment: list[str] = []
    folder: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if key == "--config-dir":
            folder = [key, value if equals else next(rest, "")]
        elif not equals:
            raise UserError(f"'{argument}' is not KEY=VALUE", remedy="--help shows what there is")
        elif key == "task" or key.startswith("env."):
            environment.append(f"env.{key.removeprefix('env.')}={value}")
        else:
            own[key] = yaml.safe_load(value)
    made = typed.build(options, own, "")
    name = own.get("env")
    if not name:
        raise UserError("no environment is named", remedy="add env=NAME, a file of conf/simulation/ such as reach")
    return made, cli.compose([f"+simulation@env={name}", *environment, *folder], primary=None)["env"]
