"""The files of a dataset, numbered, by the templates that its info.json gives for their paths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path, PurePosixPath
from string import Formatter

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.lerobot.info import Info
from opentau_train.data.remote.mirror import mirror_at
from opentau_train.errors import UserError


@dataclass(frozen=True)
class FileTable:
    """Files of one kind, numbered: file i has the LeRobot numbers `chunk[i]` and `file[i]` in the path `template` below
    `root`. Paths are made when asked for: 100,000 files cost 16 bytes each."""

    root: Path
    template: str
    chunk: NDArray[np.int64]
    file: NDArray[np.int64]
    video_key: str = ""

    def __len__(self) -> int:
        return len(self.file)

    def relative(self, number: int) -> str:
        """The path of file `number` below `root`."""
        chunk, file = int(self.chunk[number]), int(self.file[number])
        return self.template.format(
            chunk_index=chunk, file_index=file, episode_chunk=chunk, episode_index=file, video_key=self.video_key
        )

    def path(self, number: int) -> Path:
        """The whole path of file `number`."""
        return self.root / self.relative(number)

    def on_disk(self) -> list[Path]:
        """The files that the template may name, here or on the server, sorted, whether the metadata name them or
        not."""
        parts = [(text, field) for text, field, _, _ in Formatter().parse(self.template)]
        pattern = "".join(re.escape(text) + (r"\d+" if field else "") for text, field in parts)
        mirror = mirror_at(self.root)
        if mirror is None:
            names = glob("".join(escape(text) + ("*" if field else "") for text, field in parts), root_dir=self.root)
        else:
            names = list(mirror.entries)
        return sorted(self.root / name for name in names if re.fullmatch(pattern, name))


def number_files(
    info: Info, key: str, chunk: NDArray[np.int64], file: NDArray[np.int64], video_key: str = ""
) -> tuple[FileTable, NDArray[np.int32]]:
    """(the files that the template `key` gives for the pairs of `chunk` and `file` [E], each episode's place among them
    [E]). Raises `UserError` for a template that can't be filled in."""
    pairs, number = np.unique(np.stack([chunk, file]), axis=1, return_inverse=True)
    files = FileTable(info.root, str(info.get(key)), pairs[0], pairs[1], video_key)
    try:
        made = PurePosixPath(files.relative(0))
        if made.is_absolute() or ".." in made.parts or "\0" in str(made):
            raise ValueError("it leads out of the dataset's directory, or no file can have such a name")
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{key} '{files.template[:200]}' can't be filled in: {error}",
            where=str(info.path),
            remedy="use LeRobot's placeholders: chunk_index, file_index, episode_chunk, episode_index, video_key",
        ) from error
    return files, number.reshape(-1).astype(np.int32)
