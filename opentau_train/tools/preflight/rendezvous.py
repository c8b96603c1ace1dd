"""Whether the variables fit by which the processes of a launch find each other."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from opentau_train.tools.preflight.lines import Line


@dataclass(frozen=True)
class Topology:
    """The launch that the environment describes, as the launchers and torchrun name it."""

    nodes: int
    per_node: int
    known: bool = True
    """Whether somebody has said how many processes there will be; else one is taken for it."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


def rendezvous(environ: Mapping[str, str], ranks: int | None) -> tuple[list[Line], Topology]:
    """Whether the variables of a launch fit each other, and the launch; `ranks`, if given, instead of theirs."""
    lines: list[Line] = []

    def whole(name: str, default: int, least: int, most: int = 2**31) -> int:
        text = environ.get(name, "")
        if text and not (text.isdigit() and least <= int(text) <= most):
            lines.append(
                Line("rendezvous", "error", f"{name}={text} is no whole number from {least} on", name, f"set {name}")
            )
        return int(text) if text.isdigit() else default

    of_slurm = whole("SLURM_JOB_NUM_NODES", 1, 1)
    nodes, per_node = whole("NNODES", of_slurm, 1), whole("NPROC_PER_NODE", whole("SLURM_GPUS_ON_NODE", 1, 1), 1)
    node, port = whole("NODE_RANK", 0, 0), whole("MASTER_PORT", 29500, 1, 65535)
    address, launched = environ.get("MASTER_ADDR", ""), environ.get("WORLD_SIZE", "")
    if launched and not lines:  # torchrun has started this process, or means to look like it
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            what, remedy = (
                f"WORLD_SIZE is set, but not {', '.join(missing)}",
                "start with torchrun, or unset WORLD_SIZE",
            )
            lines.append(Line("rendezvous", "error", what, "the environment", remedy))
    if node >= nodes:
        remedy = f"give every node its own NODE_RANK from 0 to {nodes - 1}, and all of them the same NNODES"
        lines.append(Line("rendezvous", "error", f"NODE_RANK={node} is outside of NNODES={nodes}", "NODE_RANK", remedy))
    if nodes > 1 and not address and of_slurm == 1:
        remedy = "set MASTER_ADDR to the host name or address of node 0, the same on every node"
        lines.append(Line("rendezvous", "error", f"NNODES={nodes} needs MASTER_ADDR", "MASTER_ADDR", remedy))
    if address and not _resolves(address):
        remedy = "give an address that all nodes can reach; on a login node it may be unknown although they know it"
        lines.append(Line("rendezvous", "warning", f"{address} is not known here", "MASTER_ADDR", remedy))
    known = any(environ.get(name) for name in ("NPROC_PER_NODE", "SLURM_GPUS_ON_NODE", "WORLD_SIZE"))
    topology = Topology(nodes, per_node, known) if ranks is None else Topology(1, ranks)
    if not lines:
        text = "one process" if topology.ranks == 1 else f"{topology.ranks} processes"
        if nodes > 1:
            place = f"{address}:{port}" if address else "the first node of SLURM's job"
            text = f"{nodes} nodes of {per_node} processes, which meet at {place}"
        lines.append(Line("rendezvous", "ok", text))
    return lines, topology


def _resolves(address: str) -> bool:
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        return False
    return True
