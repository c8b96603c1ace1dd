"""Which classes a file may name that others wrote: a checkpoint's configuration, an exported policy's.

A `_target_` is imported and called, so it could be any function of any package. In such a file it may name a policy or
a transform of this package, and what is in an installed plugin (an entry point of the group `PLUGINS`) or in a module
that the user trusts by name. What the user's own command line or YAML names isn't asked.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from opentau_train.config.typed import TARGET, locate
from opentau_train.errors import UserError

PLUGINS = "opentau_train.plugins"
_OWN = "opentau_train."
_KINDS = {"opentau_train.models.policy.Policy", "opentau_train.data.transforms.base.Transform"}
_NAMED = re.compile(rf"""{TARGET}: *["']?({re.escape(_OWN)}[\w.]+)""")


def targets(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every `_target_` in a tree."""
    if isinstance(tree, Mapping):
        if TARGET in tree:
            yield path, tree[TARGET]
        inside = [(f"{path}.{key}" if path else str(key), value) for key, value in tree.items()]
    else:
        inside = [(f"{path}[{i}]", value) for i, value in enumerate(tree)] if isinstance(tree, list | tuple) else []
    for place, value in inside:
        yield from targets(value, place)


def check_targets(
    tree: Any,
    where: str,
    trust: Collection[str] = (),
    among: Collection[Any] | None = None,
    *,
    configured: bool = False,
) -> None:
    """Raises `UserError` for a `_target_` in `tree`, a file's at `where`, that nobody has vouched for; nothing that it
    names has been imported then. `trust`: names of modules; `among`: those that are the file's, None: all;
    `configured`: what the program's YAML names may be called too."""
    for place, target in targets(tree):
        if (among is None or target in among) and not _is_vouched_for(target, trust, configured):
            own = not isinstance(target, str) or target.startswith(_OWN)
            module = str(target).rpartition(".")[0][:80]
            trusted = f"if you trust its author, who could run any code with it, add trust=[{module}]"
            raise UserError(
                f"{place}.{TARGET} names '{str(target)[:80]}', which a file of others may not have called",
                where=where,
                remedy="take the file from somebody whom you trust" if own else trusted,
            )


def _is_vouched_for(target: Any, trust: Collection[str], configured: bool) -> bool:
    if not isinstance(target, str):
        return False
    if not target.startswith(_OWN):
        known = {*trust, *(entry.module for entry in entry_points(group=PLUGINS))}
        return any(target.startswith(f"{module}.") for module in known)
    if configured and target in _configured():
        return True
    if ".__" in target:  # `__main__`, whose import is a run
        return False
    bases = getattr(locate(target, ""), "__mro__", ())
    return any(f"{base.__module__}.{base.__qualname__}" in _KINDS for base in bases)


@cache
def _configured() -> frozenset[str]:
    """The classes of this package that its own YAML names."""
    texts = (file.read_text(encoding="utf-8") for file in _files(importlib.resources.files("opentau_train.conf")))
    return frozenset(target for text in texts for target in _NAMED.findall(text))


def _files(folder: Any) -> Iterator[Any]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        elif entry.name.endswith(".yaml"):
            yield entry
