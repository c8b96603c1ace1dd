"""Who is named when a collective breaks. Several ranks' roll calls over one real store, in one process."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch.distributed as dist

from opentau_train.distributed import rollcall
from opentau_train.distributed.rollcall import RollCall, is_broken_collective
from opentau_train.errors import Teller

CLOSED = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:9000")


@pytest.fixture
def store():
    return dist.HashStore()


def ranks(store: dist.Store, hosts: list[str], monkeypatch) -> list[RollCall]:
    """One rank on each of `hosts`."""
    calls = []
    for rank, host in enumerate(hosts):
        monkeypatch.setattr(rollcall.socket, "gethostname", lambda host=host: host)
        calls.append(RollCall(store, rank, len(hosts)))
    return calls


def ended_process() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def test_an_ended_process_is_named_at_once_and_told_once_a_host(store, monkeypatch):
    monkeypatch.setattr(rollcall, "ANSWER_SECONDS", 1000.0)
    pid = ended_process()
    first, second = ranks(store, ["a", "a", "a"], monkeypatch)[:2]
    store.set("rollcall/host/a/3", f"2:{pid}")
    store.set("rollcall/place/2", f"a, process {pid}")
    told, silent = first.explain(CLOSED), second.explain(CLOSED)
    assert told is not None and told.what.startswith("rank 2 is gone") and told.teller is Teller.THIS_RANK
    assert told.where == f"a, process {pid}" and "resume=auto" in told.remedy
    assert silent is not None and silent.teller is Teller.ANOTHER_RANK


@pytest.mark.parametrize("lost", [[1], [3, 4, 9]])
def test_silent_ranks_of_other_hosts_are_named_after_a_while(lost, store, monkeypatch):
    monkeypatch.setattr(rollcall, "ANSWER_SECONDS", 0.3)
    calls = ranks(store, [f"host{rank}" for rank in range(12)], monkeypatch)
    for rank in set(range(1, 12)) - set(lost):
        store.set(f"rollcall/answer/{rank}", "here")
    fault = calls[0].explain(CLOSED)
    assert (
        fault is not None
        and f"rank {lost[0]}" in fault.what
        and "is gone" in fault.what
        and fault.teller is Teller.THIS_RANK
    )
    assert fault.where == f"host{lost[0]}, process {os.getpid()}"
    assert all(str(rank) in fault.what for rank in lost)


def test_a_living_process_of_this_machine_is_not_accused(store, monkeypatch):
    monkeypatch.setattr(rollcall, "ANSWER_SECONDS", 0.3)
    assert ranks(store, ["a", "a"], monkeypatch)[0].explain(CLOSED) is None


def test_an_error_of_one_rank_is_its_own_and_what_the_others_tell(store, monkeypatch):
    first, second, third = ranks(store, ["a", "b", "c"], monkeypatch)
    assert second.explain(ValueError("no such camera\nand more")) is None
    assert third.explain(KeyError("a later one")) is None
    fault = first.explain(CLOSED)
    assert fault is not None and fault.what == "rank 1 failed: ValueError: no such camera"


def test_ranks_that_are_all_there_have_nothing_to_tell(store, monkeypatch):
    monkeypatch.setattr(rollcall, "ANSWER_SECONDS", 1000.0)
    first, second = ranks(store, ["a", "b"], monkeypatch)
    store.set("rollcall/answer/1", "here")
    store.add("rollcall/answers", 1)
    assert first.explain(CLOSED) is None and second.explain(CLOSED) is None


def test_a_lost_store_means_rank_0s_node():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    caller = RollCall(client, 1, 2)
    del server
    fault = caller.explain(CLOSED)
    assert fault is not None and "rank 0's node is lost" in fault.what
    assert caller.explain(ValueError("its own")) is None


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
