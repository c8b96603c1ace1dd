"""The words of a command line: which set something, and what is made of them for Hydra."""

from __future__ import annotations

import re
from collections.abc import Sequence

_VALUE_OVERRIDE = re.compile(r"^(?!hydra\.)[A-Za-z_][\w-]*(\.[\w\-]+)+=")
_RESUME = re.compile(r"^\+{0,2}resume=(?!\{)")
SAID_AGAIN = "+chosen="
"""Begins the argument by which Hydra hears what the chosen options say after all recipes."""
CONFIG_DIR = ("--config-dir", "-cd")
MULTIRUN = ("--multirun", "-m")
HELPING = ("--help", "-h")
SHOWING = (*HELPING, "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
"""Options that show something instead of running."""


def settable(argument: str) -> str:
    """`a.b=1` as `++a.b=1`: set it, there or not. Group choices (`data=droid`) and Hydra's own keys stay.

    `resume=X` becomes `resume.checkpoint=X`: Hydra would replace the whole node, and `resume.data=restart` with it.
    """
    argument = _RESUME.sub("resume.checkpoint=", argument)
    return f"++{argument}" if _VALUE_OVERRIDE.match(argument) else argument


def is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def without_cfg(arguments: Sequence[str]) -> tuple[list[str], str]:
    """The arguments of the run of which `--cfg` shows the configuration, and what it shows; "" without it."""
    rest, shown, words = [], "", iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--cfg", "-c", "--package", "-p"):
            value = value if equals else next(words, "")
            shown = value if name in ("--cfg", "-c") else shown
        elif name not in (*SHOWING, "--resolve"):
            rest.append(word)
    return rest, shown
