"""Two hosts for real: two network namespaces joined by a cable, each with its own loopback, running the launcher."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.hosts import ADDRESSES, Hosts, two_hosts

from tests.program import REPO, TINY_POLICY, environment, metrics, run

MARKS = ("slow", "distributed", "hosts", "timed")
pytestmark = [*(getattr(pytest.mark, name) for name in MARKS), pytest.mark.timeout(600)]

RUN = [*TINY_POLICY, "data.num_workers=0", "trainer.global_batch_size=4", "trainer.steps=6", "trainer.log_every=1"]
RUN += ["validation.every=3", "validation.max_samples_per_group=4", "checkpoint.every=3", "logger=none"]


@pytest.fixture
def network() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("left out: no program `ip` to make network namespaces with")
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_hosts())
        except OSError as error:
            pytest.skip(f"left out: no network namespaces can be made here: {error}")
        yield made


@pytest.fixture
def hosts(network) -> tuple[str, str]:
    """Names of two namespaces; the interface of each is named `cable` and has its address of `ADDRESSES`."""
    return network.names


def start(name: str, rank: int, dataset: Path, cwd: Path, overrides: list[str], **extra: str) -> subprocess.Popen:
    """The launcher on one host."""
    env = environment(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        DATASET_PATH=str(dataset),
        NNODES="2",
        NODE_RANK=str(rank),
        NPROC_PER_NODE="1",
        MASTER_ADDR=ADDRESSES[0],
        MASTER_PORT="29444",
        GLOO_SOCKET_IFNAME="cable",
        RUN_DIR=str(cwd / "run"),
        **extra,
    )
    # A name of its own too: the hosts would know each other's processes else.
    own_name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
    command = ["ip", "netns", "exec", name, *own_name, str(REPO / "launchers" / "train_droid_policy.sh"), *overrides]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=cwd, text=True, stdout=pipe, stderr=subprocess.STDOUT)


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Their outputs, in order; ends what is left when one takes too long."""
    try:
        return [p.communicate(timeout=200)[0] for p in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def test_two_hosts_train_as_two_processes_of_one_do(hosts, tmp_path):
    from opentau_train.data.builtin.droid import ensure_droid_sample

    dataset = ensure_droid_sample(Path("~/.cache/opentau_train").expanduser())["joint"]
    overrides = [*RUN, "validation.batch_size=2"]
    nodes = [start(name, rank, dataset, tmp_path, overrides) for rank, name in enumerate(hosts)]
    outputs = finish(nodes)
    assert [n.returncode for n in nodes] == [0, 0], "\n".join(outputs)
    for rank in (0, 1):
        log = (tmp_path / "logs" / f"train_droid_policy.node{rank}.log").read_text()
        assert f"--nnodes 2 --node-rank {rank} --master-addr {ADDRESSES[0]}" in log
    command = ["+recipe=droid_policy", *overrides, f"paths.run_dir={tmp_path / 'one'}"]
    one = run(command, ranks=2, DROID_ROOT=str(dataset))
    assert one.returncode == 0, one.stderr
    assert metrics(tmp_path / "run") == metrics(tmp_path / "one")


@pytest.mark.nightly
def test_a_host_with_other_settings_is_named_before_training(hosts, tmp_path):
    """By day test_never_hang.py has ranks of one host that differ."""
    from opentau_train.data.builtin.droid import ensure_droid_sample

    dataset = ensure_droid_sample(Path("~/.cache/opentau_train").expanduser())["joint"]
    nodes = [
        start(name, rank, dataset, tmp_path, [*RUN, f"optimizer.lr=0.00{rank + 1}"]) for rank, name in enumerate(hosts)
    ]
    outputs = finish(nodes)
    assert all(n.returncode for n in nodes)
    assert "error: rank 1 differs from rank 0 in: the configuration's 'optimizer'" in outputs[0], outputs[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def training(hosts, tmp_path, *overrides: str) -> list[subprocess.Popen]:
    """The launchers of both hosts, in an endless run that has made a few steps."""
    from opentau_train.data.builtin.droid import ensure_droid_sample

    dataset = ensure_droid_sample(Path("~/.cache/opentau_train").expanduser())["joint"]
    endless = [*RUN, "trainer.steps=1000000", "validation.every=0", "checkpoint.every=0", *overrides]
    nodes = [start(name, rank, dataset, tmp_path, endless) for rank, name in enumerate(hosts)]
    wait_for_rows(nodes, tmp_path / "run", 3)
    return nodes


def wait_for_rows(nodes: list[subprocess.Popen], run_dir: Path, num: int) -> None:
    rows, end = run_dir / "metrics.jsonl", time.monotonic() + 200
    while not rows.exists() or rows.read_text().count("\n") < num:
        assert time.monotonic() < end and all(n.poll() is None for n in nodes), finish(nodes)
        time.sleep(0.1)


def test_a_rank_killed_on_one_host_is_named_on_the_other(hosts, tmp_path):
    nodes = training(hosts, tmp_path)
    victim = next(pid for pid in descendants(nodes[1].pid) if b"RANK=1" in environ(pid))
    os.kill(victim, signal.SIGKILL)
    outputs = finish(nodes)
    assert all(n.returncode for n in nodes)
    assert "error: rank 1 is gone" in outputs[0] and f"{hosts[1]}, process {victim}" in outputs[0], outputs[0]


def test_a_network_that_is_away_for_a_quarter_of_a_minute_costs_no_step_and_one_that_stays_away_ends_both(
    hosts, network, tmp_path
):
    """Nothing closes a connection then, and a step may take half an hour."""
    nodes = training(hosts, tmp_path)
    network.cable("down")
    time.sleep(15)
    before = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    network.cable("up")
    wait_for_rows(nodes, tmp_path / "run", before + 20)
    network.cable("down")
    outputs = finish(nodes)
    assert all(n.returncode for n in nodes)
    steps = list(metrics(tmp_path / "run"))
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= before + 20
    assert "error: rank 1 is gone" in outputs[0] and hosts[1] in outputs[0], outputs[0]
    assert "error: the connection to rank 0's node is lost" in outputs[1], outputs[1]


def descendants(pid: int) -> list[int]:
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [deeper for child in found for deeper in descendants(child)]


def environ(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
