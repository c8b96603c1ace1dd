"""Who is named when a collective breaks. Several ranks' roll calls over one real store, in one process."""

from __future__ import annotations

import json
import socket
import subprocess

import pytest
import torch.distributed as dist

from opentau_train import rollcall
from opentau_train.rollcall import RollCall, is_broken_collective

CLOSED = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:9000")


@pytest.fixture
def store():
    return dist.HashStore()


def ranks(store: dist.Store, size: int) -> list[RollCall]:
    return [RollCall(store, rank, size) for rank in range(size)]


def ended_process() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def move(store: dist.Store, rank: int, host: str, pid: int) -> None:
    store.set(f"rollcall/place/{rank}", json.dumps([host, pid]))


def test_an_ended_process_is_named_at_once_and_told_once_a_host(store, monkeypatch):
    monkeypatch.setattr(rollcall, "ANSWER_SECONDS", 1000.0)
    first, second, _ = ranks(store, 3)
    pid = ended_process()
    move(store, 2, socket.gethostname(), pid)
    faults = [first.explain(CLOSED), second.explain(CLOSED)]
    for fault in faults:
        assert fault is not None and fault.what.startswith("rank 2 is gone")
        assert fault.where == f"{socket.gethostname()}, process {pid}" and "resume=auto" in fault.remedy
    assert [fault.told_here for fault in faults] == [True, False]


def test_a_silent_rank_of_another_host_is_named_after_a_while(store, monkeypatch):
    monkeypatch.setattr(rollcall, "ANSWER_SECONDS", 0.3)
    first, _ = ranks(store, 2)
    move(store, 1, "elsewhere", 1)
    fault = first.explain(CLOSED)
    assert fault is not None and fault.what.startswith("rank 1 is gone") and fault.where == "elsewhere, process 1"


def test_an_error_of_one_rank_is_its_own_and_what_the_others_tell(store):
    first, second = ranks(store, 2)
    assert second.explain(ValueError("no such camera\nand more")) is None
    fault = first.explain(CLOSED)
    assert fault is not None and fault.what == "rank 1 failed: ValueError: no such camera"


def test_ranks_that_are_all_there_have_nothing_to_tell(store):
    first, second = ranks(store, 2)
    store.set("rollcall/answer/1", " ")
    assert first.explain(CLOSED) is None
    assert second.explain(CLOSED) is None


def test_a_lost_store_means_rank_0s_node():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    caller = RollCall(client, 1, 2)
    del server
    fault = caller.explain(CLOSED)
    assert fault is not None and "rank 0's node is lost" in fault.what


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (CLOSED, True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("gloo.txt: no such file"), False),
    ],
)
def test_only_a_broken_collective_is_asked_about(error, broken):
    assert is_broken_collective(error) == broken
