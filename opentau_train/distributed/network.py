"""A lost network, or a node without power, ends the run within a minute.

A process that dies closes its connections, which its peers see at once. A cable that is pulled closes nothing: a rank
would wait for its peer as long as a step may take, half an hour by default. So the kernel is asked to look: whoever
doesn't answer for `LOST_SECONDS` is gone, its connections break, and what breaks is explained by the roll call. A
shorter interruption is survived: the kernel sends again what was lost.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import closing, suppress
from pathlib import Path

LOST_SECONDS = 32
"""After which silence a peer is gone: 10 s without traffic, then probes every 2 s; or as long for what was sent."""
_IDLE, _EVERY = 10, 2
_OPTIONS = {
    "TCP_KEEPIDLE": _IDLE,
    "TCP_KEEPINTVL": _EVERY,
    "TCP_KEEPCNT": (LOST_SECONDS - _IDLE) // _EVERY,
    "TCP_USER_TIMEOUT": 1000 * LOST_SECONDS,
}
"""{name in `socket`: value}, seconds, probes, and milliseconds (tcp(7)). A system without one does without it."""


def watch_connections() -> int:
    """Ask the kernel to watch every TCP connection that the process has now; returns how many these are.

    Neither gloo nor torch's store has an option for it, so it is set on their sockets from outside.
    """
    watched = 0
    for entry in _descriptors():
        with suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                with closing(socket.socket(fileno=os.dup(int(entry)))) as connection:
                    watched += _watch(connection)
    return watched


def _descriptors() -> list[str]:
    folder = Path("/proc/self/fd")
    return os.listdir(folder) if folder.is_dir() else [str(fd) for fd in range(3, 4096)]


def _watch(connection: socket.socket) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return False
    try:
        connection.getpeername()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _OPTIONS.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    except OSError:  # it listens, or its peer has closed it
        return False
    return True
