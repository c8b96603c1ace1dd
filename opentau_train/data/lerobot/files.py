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


def distinct_pairs(
    first: NDArray[np.int64], second: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(the distinct pairs of numbers from 0 on [E] in lexical order: those of `first` [F], of `second` [F]; which of
    them each of the E is). Pairs that rise already, as metadata list them, aren't sorted."""
    base = int(second.max(initial=0)) + 1
    if int(first.max(initial=0)) >= 2**63 // base:  # no file is numbered so; its number tells as much as it does
        first_known, first_code = np.unique(first, return_inverse=True)
        second_known, second_code = np.unique(second, return_inverse=True)
        codes = distinct_pairs(first_code.reshape(-1), second_code.reshape(-1))
        return first_known[codes[0]], second_known[codes[1]], codes[2]
    key = first * base + second
    step = np.diff(key)
    if (step >= 0).all():
        begins = np.append(len(key) > 0, step > 0)[: len(key)]
        known, number = key[begins], np.cumsum(begins) - 1
    else:
        known, number = np.unique(key, return_inverse=True)
    return known // base, known % base, number.reshape(-1)


def number_files(
    info: Info, key: str, chunk: NDArray[np.int64], file: NDArray[np.int64], video_key: str = ""
) -> tuple[FileTable, NDArray[np.int32]]:
    """(the files that the template `key` gives for the pairs of `chunk` and `file` [E], each episode's place among them
    [E]). Raises `UserError` for a template that can't be filled in."""
    chunks, names, number = distinct_pairs(chunk, file)
    files = FileTable(info.root, str(info.get(key)), chunks, names, video_key)
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
    return files, number.astype(np.int32)
