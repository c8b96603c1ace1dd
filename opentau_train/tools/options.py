"""The command line of tools that take KEY=VALUE and compose nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import yaml

from opentau_train.config import typed
from opentau_train.errors import UserError

T = TypeVar("T")


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
