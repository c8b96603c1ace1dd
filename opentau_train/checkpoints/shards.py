"""Tensors out of a checkpoint's state/, whoever wrote it: torch.distributed.checkpoint without the code in its pickles.

PyTorch keeps which tensor lies where in `.metadata`, a pickle, which may call any function, and reads what is no
tensor by `torch.load(weights_only=False)`. Here the pickle may only make the classes that such metadata consist of;
nothing but tensors is read, with `weights_only=True`, and from plain files of the directory alone. Checkpoints of
older versions are read alike: they have no other classes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from opentau_train import strangers
from opentau_train.errors import Explained, UserError, check_machine

STATE = "state"
METADATA = ".metadata"
METADATA_BYTES = 2**30
LISTING_BYTES = 2**16
"""At the end of a tensor's archive, where it lists what is in it."""
_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    f"{_DCP}.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}
"""{module: what `.metadata` may name of it}, besides the types of tensors."""
DEEPEST = 100
"""Levels of such a pickle; PyTorch's have a dozen."""


_FILLING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.0 to 3.11.3 writes a member of an enum
            return _member
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of such metadata")
        return super().find_class(module, name)


def _member(*given: Any) -> Any:
    if len(given) != 2 or given[0] is not _MEM_FORMAT_ENCODING or given[1] not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError("it names builtins.getattr for what is no memory format")
    return _MEM_FORMAT_ENCODING[given[1]]


def check_nesting(data: bytes) -> None:
    """Raises `pickle.UnpicklingError` where a pickle nests deeper than `DEEPEST`: a deep tuple's hash overflows the C
    stack, which ends the process. Nothing is made here; the depth of each value on the stack is followed."""
    depths: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "MARK":
            marks.append(len(depths))
        elif opcode.name == "MEMOIZE" or opcode.name.endswith("PUT"):
            memo[len(memo) if argument is None else int(argument)] = depths[-1]
        elif opcode.name.endswith("GET"):
            depths.append(memo[int(argument or 0)])
        else:
            inputs, marked = opcode.stack_before, pickletools.markobject in opcode.stack_before
            start = marks.pop() - inputs.index(pickletools.markobject) if marked else len(depths) - len(inputs)
            taken, depths[start:] = depths[start:], []
            # What is put into a container leaves it one level deeper than itself at most, however many there are.
            container = taken.pop(0) if opcode.name in _FILLING else 0
            depth = max(container, 1 + max(taken, default=0))
            if depth > DEEPEST:
                raise pickle.UnpicklingError(f"it nests deeper than {DEEPEST} levels")
            depths += [depth] * len(opcode.stack_after)


class Reader(dcp.FileSystemReader):
    """Of the directory `folder`. Raises `UserError` where it has no metadata, or none that may be read."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self.folder / METADATA
        try:
            data = strangers.read_bytes(path, METADATA_BYTES)
            check_nesting(data)
            metadata = _Unpickler(io.BytesIO(data)).load()
            for place in metadata.storage_data.values():
                self._check_place(place)
            if not isinstance(metadata.state_dict_metadata, Mapping):
                raise TypeError("it has no table of tensors")
        except (*strangers.MALFORMED, AssertionError, RuntimeError) as error:
            check_machine(error, path)
            raise damaged(path, error) from error
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _check_place(self, place: Any) -> None:
        if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
            raise ValueError(f"it has a tensor in {str(place.relative_path)[:80]!r}, which is no file beside it")

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """The bytes of one tensor, an archive as `torch.save` makes it: nothing in it is compressed."""
        strangers.check_plain(self.folder / sinfo.relative_path)
        listing = min(sinfo.length, LISTING_BYTES)
        file.seek(sinfo.offset + sinfo.length - listing)
        with zipfile.ZipFile(End(file.read(listing), sinfo.length)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError(f"a tensor of {sinfo.relative_path} is compressed")
        return super()._slice_file(file, sinfo)


class End(io.BytesIO):
    """The last bytes of a file of `length`, at their places in it: Python refuses an archive whose directory isn't
    where it says: since 3.11.14, 3.12.12 and 3.13.8, and in those of Debian and Ubuntu."""

    def __init__(self, content: bytes, length: int):
        super().__init__(content)
        self._begins = length - len(content)

    def seek(self, place: int, whence: int = io.SEEK_SET, /) -> int:
        return super().seek(place - self._begins if whence == io.SEEK_SET else place, whence) + self._begins

    def tell(self) -> int:
        return super().tell() + self._begins


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor there")


def read(path: Path, tensors: dict[str, Any], *, alone: bool) -> None:
    """Fill `tensors` from the checkpoint at `path`; `alone`: this process by itself, else collective. Raises
    `UserError` for what can't be read, on all ranks alike."""
    try:
        dcp.load(tensors, storage_reader=Reader(path / STATE), planner=_Planner(), no_dist=alone)
    except CheckpointException as error:
        causes = [cause[0] if isinstance(cause, tuple) else cause for cause in error.failures.values()]
        for cause in causes:
            if isinstance(cause, Explained):
                raise cause from error
            check_machine(cause, path / STATE)
        raise damaged(path / STATE, causes[0]) from error
    except (*strangers.MALFORMED, AssertionError, RuntimeError) as error:
        if isinstance(error, Explained):
            raise
        check_machine(error, path / STATE)
        raise damaged(path / STATE, error) from error


def kinds(path: Path) -> dict[str, TensorStorageMetadata | None]:
    """{name: what the checkpoint at `path` says of the tensor}; None for what is none. Raises `UserError`."""
    entries = Reader(path / STATE).read_metadata().state_dict_metadata
    return {name: kind if isinstance(kind, TensorStorageMetadata) else None for name, kind in entries.items()}


def damaged(path: Path, cause: BaseException) -> UserError:
    """The error of a checkpoint's file that is read and refused."""
    return UserError(
        f"the checkpoint's tensors can't be read: {strangers.in_a_line(cause)}",
        where=str(path),
        remedy="take another checkpoint, from somebody whom you trust; resume=auto walks back by itself",
    )
