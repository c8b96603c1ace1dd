"""Published weights on disk: which files a path or a name on the Hub means, and what tensors are in them.

Read are safetensors files only: the older formats are pickles, which run whatever code their author put into them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opentau_train import strangers
from opentau_train.checkpoints import commit
from opentau_train.data.lerobot.info import is_lfs_pointer
from opentau_train.errors import UserError, check_machine

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FOLDER = "pretrained_model"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack")
PROCESSORS = "policy_p*processor*"
"""LeRobot's files beside the weights."""
HUB_FILES = ["*.safetensors", "*.json", "*.model"]
STATE = "training_state"
"""The directory of a policy's repository that no robot needs (`tools.push`)."""
"""What is downloaded of a repository: weights, configurations, tokenizers."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_FLOATS = ("F64", "F32", "F16", "BF16")


_UMASK = os.umask(0o077)  # it can only be read by setting it: here, where no other thread makes files
os.umask(_UMASK)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as far as the process's umask lets them: the library's own is for
    its owner alone."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    path.chmod(0o666 & ~_UMASK)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_floating_point(self) -> bool:
        return self.dtype in _FLOATS

    def read(self, name: str, part: tuple[slice, ...]) -> Any:
        """The `part` of the tensor, which its file calls `name`, on the CPU. The file is opened for this tensor alone:
        the pages that are read are let go with it."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_slice(name)[part]

    def read_whole(self, name: str) -> Any:
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(name)


def local_path(given: str, where: str) -> Path | None:
    """The file or directory that the setting `where` names; None for what can only be a name on the Hub. Raises
    `UserError` where it is neither."""
    path = Path(given).expanduser()
    if path.exists():
        return path
    if _HUB_NAME.fullmatch(given):
        return None
    raise UserError(f"'{given}' is not there", where=where, remedy="give a file or directory of weights")


def locate(given: str, where: str) -> Path:
    """The same, where a repository on the Hub is downloaded into its cache. Raises `UserError` where there is none."""
    path = local_path(given, where)
    if path is not None:
        return path
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError as error:
        what = f"no file or directory is called '{given}', and names on the Hugging Face Hub need its client: {error}"
        remedy = "check the path, or pip install huggingface_hub"
        raise UserError(what, where=where, remedy=remedy) from error
    refusals = hub.HfHubHTTPError, hub.HFValidationError, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled
    name, _, revision = given.partition("@")
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES, ignore_patterns=[f"{STATE}/*"])
        )
    except (*refusals, OSError) as error:
        check_machine(error)
        raise UserError(
            f"no file or directory is called '{given}', and it can't be downloaded from the Hugging Face Hub: "
            f"{str(error).splitlines()[0]}",
            where=where,
            remedy="check the path or the name, the network and HF_HUB_OFFLINE",
        ) from error


def open_weights(path: Path, where: str = "") -> dict[str, Entry]:
    """{name: tensor} of the weights at `path`: a safetensors file; a directory with one, or with an index of several; a
    run or a checkpoint of this program or of LeRobot. Raises `UserError` for what is none of them, or damaged."""
    if path.is_file() and path.name != INDEX:
        return _entries(path, where)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise UserError(f"'{path}' is not there", where=where, remedy="give a file or directory of weights")
    index = folder / INDEX
    if (folder / SINGLE).is_file() and path != index:
        return _entries(folder / SINGLE, where)
    if index.is_file():
        return _of_index(index, where)
    for inner in (folder, folder / "checkpoints" / "last"):  # LeRobot's, which have no manifest
        if (inner / FOLDER / SINGLE).is_file() and not (inner / "run.json").is_file():
            return _entries(inner / FOLDER / SINGLE, where)
    if (folder / "checkpoints").is_dir() or (folder / "run.json").is_file():
        return _entries(commit.at(str(folder)) / FOLDER / SINGLE, where)
    files = sorted(f for f in folder.iterdir() if f.suffix == ".safetensors" and not f.match(PROCESSORS))
    if len(files) == 1:
        return _entries(files[0], where)
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if not files and pickles:
        raise _is_pickle(folder / pickles[0], where)
    names = f" but {', '.join(f.name for f in files[:3])}" if files else ""
    raise UserError(
        f"the directory {folder} has no {SINGLE} and no {INDEX}{names}", where=where, remedy="name the file itself"
    )


def _entries(file: Path, where: str) -> dict[str, Entry]:
    if file.suffix in PICKLES:
        raise _is_pickle(file, where)
    try:
        strangers.check_plain(file)
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it isn't a mapping)
            return {n: Entry(file, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (OSError, SafetensorError) as error:
        check_machine(error, file)
        if file.is_file() and is_lfs_pointer(file):
            what, remedy = "is a git-lfs pointer, not the weights", "run `git lfs pull` in its directory"
        else:
            what, remedy = f"is no whole safetensors file: {error}", "download or copy it again"
        raise UserError(f"{file} {what}", where=where, remedy=remedy) from error


def _of_index(index: Path, where: str) -> dict[str, Entry]:
    """Of all files that the index names. They lie beside it: an index is a stranger's, and so could name any file."""
    try:
        listed = strangers.read_json(index)["weight_map"]
        files = sorted(set(listed.values()))
        if not all(Path(file).name == file for file in files):
            raise ValueError("it names files outside of its directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        check_machine(error, index)
        raise UserError(f"{index} can't be read: {error!r}", where=where, remedy="download it again") from error
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= _entries(index.parent / file, where)
    absent = [name for name in listed if name not in entries]
    if absent:
        raise UserError(
            f"{index} names {len(absent)} tensors that its files don't have: {', '.join(absent[:3])}",
            where=where,
            remedy="download the files again",
        )
    return entries


def _is_pickle(file: Path, where: str) -> UserError:
    return UserError(
        f"{file} is a pickle, which could run any code when it is read",
        where=where,
        remedy="convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)",
    )
