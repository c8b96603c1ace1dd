"""What the file of a chosen option says itself: a group that is chosen on the command line beats a recipe by it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.resources.abc import Traversable
from typing import Any

from omegaconf import DictConfig, OmegaConf

_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.M)
_BUNDLE = "_global_"


def own_words(choices: Iterable[tuple[str, str]], roots: Sequence[Traversable]) -> DictConfig:
    """The tree of what the files of `choices`, pairs of a group and an option, say themselves.

    What an option takes from others by its `defaults` isn't in it: `validation=none` says that there is no pass, and
    leaves a recipe its evaluators. Bundles (`# @package _global_`: recipes, scales, debugging) speak of many groups and
    are left out, like options without a file below one of the `roots`, of which the first one that has it counts.
    """
    said: Any = OmegaConf.create({})
    for group, option in choices:
        files = (root.joinpath(f"{group}/{option}.yaml") for root in roots)
        text = next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")
        header = _PACKAGE.search(text)
        package = header[1] if header else group.replace("/", ".")
        words = OmegaConf.create(text)
        if package != _BUNDLE and isinstance(words, DictConfig):
            words.pop("defaults", None)
            OmegaConf.update(said, package, words, force_add=True)
    return said
