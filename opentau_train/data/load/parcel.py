"""How what a worker has built reaches the main process: in a file of memory of its own.

Torch's own way puts each tensor into /dev/shm, whose size is a container's setting (64 MB in Docker), and pickles on a
thread whose errors nobody hears. Here one file holds all tensors of an item; it is memory like any other of the job's,
and what goes wrong is raised where the item is packed.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import pickle
import socket
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT = 64
"""Bytes that a buffer's place in the file is a multiple of: a cache line."""


@dataclass(frozen=True)
class Parcel:
    """An item without its arrays, and the places [start, end) of their bytes in its file; the number of its `sender`,
    through whose channel the file comes."""

    sender: int
    pickled: bytes
    places: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return self.places[-1][1] if self.places else 0


def pack(item: Any, sender: int, channel: socket.socket) -> Parcel:
    """The parcel of `item`, whose file is sent through `channel`. The arrays and tensors of it are copied once. Raises
    OSError and MemoryError where there is no room for them."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(item)
    places, end = [], 0
    for buffer in buffers:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + buffer.raw().nbytes
        places.append((start, end))
    parcel = Parcel(sender, stream.getvalue(), tuple(places))
    if parcel.num_bytes:
        with memory_file() as file:
            # Written, not copied into a mapping of it: a page that can't be had is an error here, there a SIGBUS.
            for buffer, (start, _) in zip(buffers, places, strict=True):
                file.seek(start)
                file.write(buffer.raw())
            file.flush()
            socket.send_fds(channel, [b"\0"], [file.fileno()])
    return parcel


def unpack(parcel: Parcel, channel: socket.socket) -> Any:
    """The item of a parcel, the channel's next. Its arrays lie in the file itself, which goes when the last of them
    does. Raises OSError where the file can't be opened or mapped."""
    memory = memoryview(b"")
    if parcel.num_bytes:
        _, files, _, _ = socket.recv_fds(channel, 1, 1)
        if not files:  # the system has dropped it
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        try:
            memory = memoryview(mmap.mmap(files[0], parcel.num_bytes))
        finally:
            os.close(files[0])
    return pickle.loads(parcel.pickled, buffers=[memory[start:end] for start, end in parcel.places])


def memory_file() -> io.BufferedRandom:
    """A new file of memory; where the system has none, an unnamed one in the directory for temporary files."""
    if sys.platform == "linux":
        return open(os.memfd_create("opentau_train"), "w+b")
    return tempfile.TemporaryFile()


class _Pickler(pickle.Pickler):
    """Gives the bytes of tensors out, as the protocol does for arrays, instead of copying them into its stream."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        tensor = value.detach()
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # as it lies, strides and all
        return _tensor, (storage.numpy(), tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())


def _tensor(raw: NDArray[np.uint8], dtype: torch.dtype, size: Any, stride: Any, offset: int) -> torch.Tensor:
    return torch.from_numpy(raw).view(dtype).as_strided(size, stride, offset)
