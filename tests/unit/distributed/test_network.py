"""What the kernel is asked to watch."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

from opentau_train.distributed.network import LOST_SECONDS, watch_connections


def connected() -> tuple[socket.socket, socket.socket, socket.socket]:
    """A listening socket, and both ends of a connection."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    return server, client, server.accept()[0]


def test_every_connection_is_watched_and_nothing_else(tmp_path):
    with ExitStack() as stack:
        server, client, accepted = (stack.enter_context(one) for one in connected())
        pair = [stack.enter_context(one) for one in socket.socketpair()]
        stack.enter_context((tmp_path / "file").open("w"))
        before = len(os.listdir("/proc/self/fd"))
        assert watch_connections() >= 2
        assert len(os.listdir("/proc/self/fd")) == before
        for one in (client, accepted):
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, every, num, limit = (
                one.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
                for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT")
            )
            assert idle + every * num == LOST_SECONDS and limit == 1000 * LOST_SECONDS
        for one in (server, *pair):
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        client.sendall(b"still there")  # the duplicates that were looked at are closed, not the connections
        assert accepted.recv(20) == b"still there"
