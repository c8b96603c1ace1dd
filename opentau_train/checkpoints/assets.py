"""The small text files that a policy reads beside its weights, such as a tokenizer: kept with it, so that it is whole.

collect(policy)       {path as the settings have it: {file: text}}
unpack(tree, assets)  writes the files into this machine's cache, and names them there in the settings
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opentau_train.errors import UserError, check_machine
from opentau_train.models.policy import Policy

KEY = "assets"
"""The card's entry, in `Pretrained.policy`."""
CACHE = "~/.cache/opentau_train/assets"

Assets = dict[str, dict[str, str]]


def collect(policy: Policy) -> Assets:
    """What the policy's `assets` hold now: a path is a file, or the folder of those of the given names that it has."""
    collected: Assets = {}
    for given, names in policy.assets().items():
        path = Path(given).expanduser()
        files = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
        collected[given] = {file.name: file.read_text(encoding="utf-8") for file in files}
    return collected


def unpack(tree: Any, assets: Mapping[str, Mapping[str, str]]) -> Any:
    """A copy of the settings `tree` in which the paths of `assets` are those of their files in this machine's cache,
    named by their content. Raises `UserError` for names of files that lead elsewhere."""
    places = {given: _write(given, files) for given, files in assets.items()} if assets else {}
    return _renamed(tree, places)


def _write(given: str, files: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(repr(sorted(files.items())).encode(), digest_size=16).hexdigest()
    folder = Path(CACHE).expanduser() / digest
    for name, text in files.items():
        if Path(name).name != name or name in ("", "..") or "\0" in name:  # a policy may be a stranger's
            raise UserError(f"'{name}' is no plain name of a file", where="the policy's assets", remedy="don't load it")
        if not (folder / name).is_file():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                part = folder / f"{name}.{os.getpid()}.part"
                part.write_text(text, encoding="utf-8")
                part.replace(folder / name)
            except OSError as error:
                check_machine(error, folder)
                raise UserError(
                    f"the policy's tokenizer can't be written: {error}",
                    where=str(folder),
                    remedy="make this directory writable, or set HOME",
                ) from error
    return str(folder / next(iter(files))) if set(files) == {Path(given).name} else str(folder)


def _renamed(tree: Any, places: Mapping[str, str]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _renamed(value, places) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_renamed(value, places) for value in tree]
    return places.get(tree, tree) if isinstance(tree, str) else tree
