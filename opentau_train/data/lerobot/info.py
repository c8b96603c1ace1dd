"""meta/info.json of a LeRobot dataset, v3.0 and v2.1: read, and its values checked once for all that use them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentau_train.errors import UserError
from opentau_train.machine import check_machine

VERSIONS = ("v3.0", "v2.1")
RESTORE = "restore the file (download or export the dataset again)"


@dataclass(frozen=True)
class Info:
    """meta/info.json. `raw` is the file's bytes, `tree` their content (keys that nobody asks for are ignored)."""

    root: Path
    where: str
    raw: bytes
    tree: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.root / "meta" / "info.json"

    @property
    def features(self) -> Mapping[str, Mapping[str, Any]]:
        return self.get("features")

    def get(self, key: str) -> Any:
        """The value of a key that must be there. Raises `UserError` where it isn't."""
        if self.tree.get(key) is None:
            raise UserError(f"meta/info.json has no '{key}'", where=str(self.path), remedy=RESTORE)
        return self.tree[key]


def read_info(root: Path, where: str) -> Info:
    """Read info.json and check the values that are used. `where` is the source's config path. Raises `UserError`."""
    if not root.is_dir():
        problem = "is not a directory" if root.exists() else "doesn't exist"
        raise UserError(f"dataset directory {root} {problem}", where=where, remedy=f"set {where}.root=DIRECTORY")
    path = root / "meta" / "info.json"
    try:
        raw = path.read_bytes()
        tree = json.loads(raw)
    except FileNotFoundError as error:
        raise UserError(
            f"{root} is not a LeRobot dataset: it has no meta/info.json",
            where=where,
            remedy=f"set {where}.root to the directory that holds meta/ and data/",
        ) from error
    except (OSError, ValueError) as error:
        check_machine(error, path)
        raise UserError(f"meta/info.json can't be read: {error}", where=str(path), remedy=RESTORE) from error
    info = Info(root, where, raw, tree if isinstance(tree, dict) else {})
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise UserError(
            f"LeRobot format {version} can't be read, only {' and '.join(VERSIONS)}",
            where=str(path),
            remedy="convert the dataset with the lerobot package's conversion scripts",
        )
    _check_values(info)
    return info


def _check_values(info: Info) -> None:
    fps, features = info.get("fps"), info.get("features")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= sys.float_info.max:
        raise _wrong(info, "fps", "a number greater than 0", fps)
    chunks_size = info.tree.get("chunks_size")
    if chunks_size is not None and not (_is_count(chunks_size) and chunks_size > 0):
        raise _wrong(info, "chunks_size", "a whole number greater than 0", chunks_size)
    if not isinstance(features, dict):
        raise _wrong(info, "features", "a mapping of columns", features)
    for name, feature in features.items():
        if not isinstance(feature, dict):
            raise _wrong(info, f"features.{name}", "a mapping", feature)
        dtype, shape = feature.get("dtype"), feature.get("shape")
        if dtype is not None and not isinstance(dtype, str):
            raise _wrong(info, f"features.{name}.dtype", "a type's name", dtype)
        if shape is not None and not (isinstance(shape, list) and all(map(_is_count, shape))):
            raise _wrong(info, f"features.{name}.shape", "a list of whole numbers", shape)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and float(value).is_integer()


def _wrong(info: Info, key: str, expected: str, value: Any) -> UserError:
    return UserError(
        f"meta/info.json: '{key}' must be {expected}, got {json.dumps(value)[:80]}",
        where=str(info.path),
        remedy=f"correct '{key}', or {RESTORE}",
    )
