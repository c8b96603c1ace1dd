"""Two hosts on this machine: network namespaces joined by a cable, which may be pulled. Needs root and iproute2."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESSES = ("10.251.98.1", "10.251.98.2")
PORT = "29445"


@dataclass(frozen=True)
class Hosts:
    """The namespaces' names; the interface of each is called `cable`."""

    names: tuple[str, str]

    def cable(self, state: str) -> None:
        """`up` or `down`."""
        _ip("-n", self.names[0], "link", "set", "cable", state)

    def command(self, program: Sequence[str]) -> list[str]:
        """Torchrun with one rank of `program` on each host, as one command that ends when both have, with code 0 if
        both did well. Each host has a name of its own, by which the ranks know each other's processes."""
        agents = []
        for rank, name in enumerate(self.names):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
            torchrun += ["--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}", *program]
            named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *torchrun]
            agents.append(f"{shlex.join(['ip', 'netns', 'exec', name, *named])} &")
        return ["sh", "-c", f"{agents[0]} a=$!; {agents[1]} b=$!; wait $a; code=$?; wait $b && exit $code"]


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Raises OSError where no namespaces can be made."""
    names, made = (f"one-{os.getpid()}", f"two-{os.getpid()}"), []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield Hosts(names)
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
