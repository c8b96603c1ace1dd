"""The command lines of tools: KEY=VALUE where nothing is composed, and --options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from opentau_train import cli
from opentau_train.config import typed
from opentau_train.errors import EXIT_OK, EXIT_USER, UserError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """The command line of the tool `name`, whose --help shows its module's `doc` as it is: an example, and the exit
    codes. A mistake ends the process with code 2, told as all others are."""

    def __init__(self, name: str, doc: str | None):
        name = f"python -m opentau_train.tools.{name}"
        as_it_stands = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=name, description=doc, formatter_class=as_it_stands, allow_abbrev=False)

    def add_of_recorded_run(self) -> None:
        """What tools take that build from a run's own configuration: changes of it, and whom it may name."""
        self.add_argument(
            "--trust", action="append", default=[], metavar="MODULE", help="a module whose classes the run may name"
        )
        self.add_argument(
            "overrides",
            nargs="*",
            metavar="KEY=VALUE",
            help="changes the run's recorded settings, e.g. data.sources.main.root=DIRECTORY where the data were moved",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER, f"error: {UserError(message, remedy='--help shows what there is')}\n")


TOKEN = "OPENTAU_SERVE_TOKEN"
"""The variable that holds a server's token. Not an argument, which every user of a machine can see."""


def answer(doc: str | None, work: Callable[[Sequence[str]], int], arguments: Sequence[str] | None) -> int:
    """A tool's exit code: of `work` with its `arguments`, None being the process's; with --help it prints `doc`."""
    words = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(words):
        print(doc)
        return EXIT_OK
    return cli.answer(lambda: work(words))


def parse(arguments: Sequence[str], options: type[T]) -> T:
    """The dataclass `options` of KEY=VALUE, values as in YAML; GROUP.KEY=VALUE sets a key of the mapping GROUP. Raises
    `UserError`."""
    tree: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"'{argument}' is not KEY=VALUE", remedy="--help shows what there is")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"'{text}' can't be read as YAML", where=key, remedy="put it in quotes") from error
        group, dot, name = key.partition(".")
        if dot:
            of_group = tree.setdefault(group, {})
            if not isinstance(of_group, dict):
                raise UserError(f"{group} is set twice", where=key, remedy=f"set {group}.{name} only")
            of_group[name] = value
        else:
            tree[key] = value
    return typed.build(options, tree, "")


def read_token(file: str | None) -> str | None:
    """The token that a server asks for, of a file or of the environment; None: there is none. Raises `UserError`."""
    from opentau_train.deploy.serving.gate import check_token

    if file is None:
        token = os.environ.get(TOKEN)
        return None if token is None else check_token(token, TOKEN)
    try:
        return check_token(Path(file).expanduser().read_text(), "token_file")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"can't read {file}: {error}", where="token_file", remedy="name a file with the token"
        ) from error
