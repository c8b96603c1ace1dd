"""What a worker hands over arrives bit for bit, needs no shared memory, and costs the receiver one file at a time."""

from __future__ import annotations

import os
import resource
import socket
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from opentau_train.data.load import workers
from opentau_train.data.load.parcel import pack, unpack
from opentau_train.errors import Fault
from tests.limits import in_small_shm

DTYPES = (torch.uint8, torch.bool, torch.int64, torch.float32, torch.float64, torch.bfloat16)


def delivered(item):
    left, right = socket.socketpair()
    with left, right:
        return unpack(pack(item, 0, right), left)


@given(st.data())
def test_tensors_and_arrays_arrive_with_their_bits_shapes_and_strides(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensor = torch.randint(0, 2, shape, dtype=torch.uint8).to(dtype)
    order = data.draw(st.permutations(range(len(shape))))
    item = {"moved": tensor.permute(order), "part": tensor[1:] if shape else tensor, "array": np.arange(3), "text": "x"}
    found = delivered(item)
    assert found["text"] == "x" and found["array"].tolist() == [0, 1, 2]
    for name in ("moved", "part"):
        assert found[name].dtype == dtype and found[name].stride() == item[name].stride()
        assert torch.equal(found[name], item[name])


def test_what_arrives_can_be_written_to_and_holds_one_file_until_it_goes():
    before = len(os.listdir("/proc/self/fd"))
    found = delivered([torch.zeros(5) for _ in range(20)])
    assert len(os.listdir("/proc/self/fd")) == before + 1
    found[3] += 1
    kept = found[4]
    assert [t.sum().item() for t in found] == [5.0 if i == 3 else 0.0 for i in range(20)]
    del found
    assert kept.tolist() == [0.0] * 5
    del kept
    assert len(os.listdir("/proc/self/fd")) == before


class Pictures(IterableDataset):
    """Four parts of 8 MB."""

    def __iter__(self):
        for i in range(4):
            yield torch.full((8 * 2**20,), i, dtype=torch.uint8)


class LimitedInWorkers(Pictures):
    """A worker may write no file, of memory or other, of more than 1 MB."""

    def __iter__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        yield from super().__iter__()


def test_what_cannot_be_handed_over_ends_the_pass_with_the_machines_words():
    with closing(workers.one_pass(LimitedInWorkers(), 1, 2)) as parts, pytest.raises(Fault, match="ulimit -f"):
        list(parts)


IN_SMALL_SHM = """
import subprocess
from opentau_train import cli
from opentau_train.data.load.workers import one_pass
from tests.unit.data.load.test_parcel import Pictures

print([int(part[-1]) for part in one_pass(Pictures(), 2, 2)], flush=True)
for option in ("ro", "rw,size=4k"):
    subprocess.run(["mount", "-o", f"remount,{option}", "/dev/shm"], check=True)
    print(cli.answer(lambda: len(list(one_pass(Pictures(), 2, 2)))), flush=True)
"""


@pytest.mark.slow
def test_a_small_shared_memory_is_no_hindrance_and_a_full_one_is_named_with_the_remedies():
    """Docker gives 64 MB. Here it is 1 MB, less than a part, for the semaphores of the workers' queues, then read-only,
    then without room for those."""
    ended = in_small_shm("1m", [sys.executable, "-c", IN_SMALL_SHM])
    assert ended.stdout == "[0, 0, 1, 1, 2, 2, 3, 3]\n1\n1\n", ended.stderr
    assert ended.stderr.count("error: no shared memory") == 2
    for words in (
        "error: no shared memory: 2 data workers need 56 kB of it",
        "/dev/shm (0 MB, 0 MB free)",
        "--shm-size",
        "data.num_workers",
    ):
        assert words in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
