"""meta/info.json of a LeRobot dataset, v3.0, v2.1 and v2.0: read, and its values checked once for all that use them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentau_train import strangers
from opentau_train.errors import UserError, check_machine, check_machine_read

VERSIONS = ("v3.0", "v2.1", "v2.0")
RESTORE = "restore the file (download or export the dataset again)"
V1_CONVERTER = "python -m lerobot.datasets.v2.convert_dataset_v1_to_v2 --repo-id=OWNER/NAME --single-task=TEXT"
"""Of lerobot 0.3.3, the last release that has it."""
INFO_BYTES = 16 * 2**20
MOST_COLUMNS, MOST_AXES = 10_000, 8
TEMPLATE = re.compile(
    r"(?:[^{}\0]|\{(?:(?:chunk_index|file_index|episode_chunk|episode_index)(?::0?[1-9]?d)?|video_key)\}){1,4096}"
)
"""Of the paths of files: LeRobot's own fields, as whole numbers of so many digits."""
LFS_HEAD = b"version https://git-lfs"
LFS_BYTES = 1024
"""A git-lfs pointer is smaller."""


@dataclass(frozen=True)
class Info:
    """meta/info.json. `raw` is the file's bytes, `tree` their content (keys that nobody asks for are ignored);
    `places`: the directories that the dataset's files may lie in."""

    root: Path
    where: str
    raw: bytes
    tree: Mapping[str, Any]
    places: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.root / "meta" / "info.json"

    @property
    def version(self) -> str:
        """One of `VERSIONS`, as they are written there."""
        return _version(self.tree.get("codebase_version"))

    @property
    def file_an_episode(self) -> bool:
        """Whether each episode has its own files (v2.0 and v2.1), and meta/ is in lines of JSON."""
        return self.version != "v3.0"

    @property
    def features(self) -> Mapping[str, Mapping[str, Any]]:
        return self.get("features")

    def get(self, key: str) -> Any:
        """The value of a key that must be there. Raises `UserError` where it isn't."""
        if self.tree.get(key) is None:
            raise UserError(f"meta/info.json has no '{key}'", where=str(self.path), remedy=RESTORE)
        return self.tree[key]


def read_info(root: Path, where: str, links: Collection[str] = ()) -> Info:
    """Read info.json and check the values that are used. `where` is the source's config path, `links` its setting of
    that name. Raises `UserError`."""
    if not root.is_dir():
        problem = "is not a directory" if root.exists() else "doesn't exist"
        raise UserError(f"dataset directory {root} {problem}", where=where, remedy=f"set {where}.root=DIRECTORY")
    path = root / "meta" / "info.json"
    try:
        raw = strangers.read_bytes(path, INFO_BYTES)
        tree = strangers.parse(raw)
    except FileNotFoundError as error:
        if (root / "meta_data" / "info.json").exists():  # where the formats before v2.0 had it
            raise _refused("v1", str(root / "meta_data" / "info.json")) from error
        raise UserError(
            f"{root} is not a LeRobot dataset: it has no meta/info.json",
            where=where,
            remedy=f"set {where}.root to the directory that holds meta/ and data/",
        ) from error
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    info = Info(root, where, raw, tree if isinstance(tree, dict) else {}, strangers.places(root, links))
    version = info.get("codebase_version")
    if _version(version) not in VERSIONS:
        raise _refused(version, str(path))
    _check_values(info)
    return info


def is_lfs_pointer(path: Path | str) -> bool:
    """Whether git left a pointer in place of the file's content."""
    try:
        strangers.check_plain(path)
        with open(path, "rb") as file:
            head = file.read(LFS_BYTES)
    except OSError as error:
        check_machine(error, path)
        return False
    return len(head) < LFS_BYTES and head.startswith(LFS_HEAD)


def unreadable(path: Path, error: BaseException, place: str = "") -> UserError:
    """The error of a file of meta/ whose reading raised `error`, at its `place`. Raises `Fault` where the machine is to
    blame."""
    check_machine_read(error, path)
    if is_lfs_pointer(path):
        return lfs_error(str(path))
    why = " ".join(str(error).split())[:400]  # Arrow's are of several lines
    return UserError(f"{path.parent.name}/{path.name} can't be read: {place}{why}", where=str(path), remedy=RESTORE)


def lfs_error(path: str, num_others: int = 0) -> UserError:
    """The error of a git-lfs pointer, and of as many others."""
    others = f" (as are {num_others} others)" if num_others else ""
    return UserError(
        f"the file is a git-lfs pointer, not the data{others}",
        where=path,
        remedy="run `git lfs pull` in the dataset's directory",
    )


def _version(value: Any) -> str:
    """The version as LeRobot writes it: "v2.1", also for "2.1" and "v2.1.0"."""
    match = re.fullmatch(r"v?(\d+)\.(\d+)(\.0)*", value) if isinstance(value, str) else None
    return f"v{int(match[1])}.{int(match[2])}" if match else ""


def _refused(version: Any, where: str) -> UserError:
    """The error of a dataset in a format that isn't read."""
    if isinstance(version, str) and re.match(r"v?1(\.|$)", version):
        remedy = f"convert it to v2.0 with lerobot 0.3.3 (pip install lerobot==0.3.3): {V1_CONVERTER}"
    else:
        remedy = "convert it to v3.0 or v2.1 with the program that wrote it"
    return UserError(
        f"LeRobot format {str(version)[:40]} can't be read, only {', '.join(VERSIONS[:-1])} and {VERSIONS[-1]}",
        where=where,
        remedy=remedy,
    )


def _check_values(info: Info) -> None:
    fps, features = info.get("fps"), info.get("features")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= sys.float_info.max:
        raise _wrong(info, "fps", "a number greater than 0", fps)
    chunks_size = info.tree.get("chunks_size")
    if chunks_size is not None and not (_is_count(chunks_size) and chunks_size > 0):
        raise _wrong(info, "chunks_size", "a whole number greater than 0", chunks_size)
    for key in ("data_path", "video_path"):
        template = info.tree.get(key)
        if template is not None and not (isinstance(template, str) and TEMPLATE.fullmatch(template)):
            raise _wrong(info, key, "a path with LeRobot's own fields, such as {chunk_index:03d}", template)
    if not isinstance(features, dict) or len(features) > MOST_COLUMNS:
        raise _wrong(info, "features", f"a mapping of columns, at most {MOST_COLUMNS:,}", features)
    for name, feature in features.items():
        if not isinstance(feature, dict):
            raise _wrong(info, f"features.{name}", "a mapping", feature)
        dtype, shape = feature.get("dtype"), feature.get("shape")
        if dtype is not None and not isinstance(dtype, str):
            raise _wrong(info, f"features.{name}.dtype", "a type's name", dtype)
        axes = shape if isinstance(shape, list) else [None]
        if shape is not None and not (len(axes) <= MOST_AXES and all(map(_is_count, axes))):
            raise _wrong(info, f"features.{name}.shape", f"a list of at most {MOST_AXES} whole numbers", shape)


def _is_count(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= 2**31 and float(value).is_integer()


def _wrong(info: Info, key: str, expected: str, value: Any) -> UserError:
    return UserError(
        f"meta/info.json: '{key}' must be {expected}, got {json.dumps(value)[:80]}",
        where=str(info.path),
        remedy=f"correct '{key}', or {RESTORE}",
    )
