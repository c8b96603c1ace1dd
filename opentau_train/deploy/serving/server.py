"""The server: openpi's protocol over websockets.

A client connects and is sent the metadata; then each of its messages is an observation, and each answer a chunk:

    {"actions": [T, A'] f32, "policy_timing": {infer_ms},
     "server_timing": {infer_ms, wait_ms, batch_size, prev_total_ms}}

An error is a text message, and the end of its connection (1011). Text, not binary: openpi's clients tell it so.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from opentau_train.deploy.serving import gate as gates
from opentau_train.deploy.serving.answers import Answer, Answers, failed
from opentau_train.deploy.serving.wire import library, pack, unpack
from opentau_train.errors import EXIT_INTERRUPTED, Explained, Fault, UserError

log = logging.getLogger(__name__)

INTERNAL_ERROR, GOING_AWAY, TOO_BIG = 1011, 1001, 1009
"""Codes of a websocket's end (RFC 6455, 7.4.1)."""
SEND_SECONDS = 10.0
"""How long a client may take to take what it is sent: some kilobytes."""
LOGGED = 300
"""Characters of a client's error that go to the log: it may hold what the client sent."""


@dataclass(frozen=True)
class Bounds:
    """What clients may take. `message` bytes of one message, `connections` at a time, `timeout` seconds for an answer,
    `idle` seconds without a message, `grace` seconds for the last answers when the server ends."""

    message: int = 16 * 2**20
    connections: int = 32
    timeout: float = 30.0
    idle: float = 3600.0
    grace: float = 10.0


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port` (0: one that is free) that doesn't listen yet. Raises `UserError`."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, proto)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
        return made
    except OSError as error:
        raise _cannot_bind(error, host, port) from error


def _cannot_bind(error: OSError, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"port {port} is taken",
            where="port",
            remedy="end what listens there, or set another: port=0 takes a free one",
        )
    if error.errno == errno.EACCES:
        return UserError(f"port {port} is the system's", where="port", remedy="set one of 1024 or more")
    remedy = "set host to an address of this machine: 127.0.0.1 for its own clients, 0.0.0.0 for all"
    return UserError(f"can't listen at {host}:{port}: {error.strerror or error}", where="host", remedy=remedy)


class Server:
    """Serves what `answers` computes at a bound `socket`, within `bounds`, to those whom a `gate` admits."""

    def __init__(self, answers: Answers, sock: socket.socket, bounds: Bounds, token: str | None = None):
        self.answers, self.socket, self.bounds = answers, sock, bounds
        self.gate = gates.Gate(bounds.connections, token)
        self.metadata = pack(answers.terms.metadata())
        self._stopping = asyncio.Event()
        self._idle: set[Any] = set()
        self._closed = library("websockets.exceptions").ConnectionClosed

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGINT or SIGTERM; `ready()` is called once clients may connect. A second signal ends the process
        at once, with `EXIT_INTERRUPTED`. Raises `UserError` where the port was taken meanwhile."""
        asyncio.run(self._run(ready))

    async def _run(self, ready: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        try:
            server = await library("websockets.asyncio.server").serve(
                self._handle,
                sock=self.socket,
                origins=[None],  # browsers say where a page is from; no page is to use a server of this machine
                compression=None,  # a bomb of a kilobyte is a gigabyte
                process_request=lambda conn, request: gates.response(conn, self.gate, request, self.answers.healthy),
                server_header=None,
                max_size=self.bounds.message,
                max_queue=1,
                create_connection=gates.connections(self.gate),
                logger=gates.quiet_logger(),
            )
        except OSError as error:
            raise _cannot_bind(error, *self.socket.getsockname()[:2]) from error
        ready()
        await self._stopping.wait()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, os._exit, EXIT_INTERRUPTED)
        server.close(close_connections=False)
        ends = [connection.close(GOING_AWAY, "the server ends") for connection in self._idle]
        try:
            async with asyncio.timeout(self.bounds.grace):
                await asyncio.gather(*ends)
                await server.wait_closed()
        except TimeoutError:
            log.warning("clients were left without an answer: %g s were not enough", self.bounds.grace)

    async def _handle(self, connection: Any) -> None:
        """One client, from its handshake on."""
        try:
            await self._send(connection, self.metadata)
            before: float | None = None
            while not self._stopping.is_set():
                message = await self._receive(connection)
                start = time.monotonic()
                request = self.answers.terms.request(unpack(message))
                self.gate.know(connection)
                answer = await self._answer(connection, self.answers.submit(request))
                if answer is None:
                    return
                await self._send(connection, pack(_reply(answer, time.monotonic() - start, before)))
                before = time.monotonic() - start
            await connection.close(GOING_AWAY, "the server ends")
        except self._closed as error:
            if error.sent is not None and error.sent.code == TOO_BIG:
                log.warning("%s sent over %d bytes: raise max_message_mb", _name(connection), self.bounds.message)
        except Explained as error:
            await self._refuse(connection, error)
        except TimeoutError:
            connection.transport.abort()  # it takes nothing, and would hold what it is sent
        except Exception as error:
            # Broad, and not to be split: of whatever kind an error is, it ends this client's connection and no other's.
            log.error("%s", _name(connection), exc_info=error)
            await self._refuse(connection, failed(error))

    async def _receive(self, connection: Any) -> bytes | str:
        """The next message. Raises `Fault` where none comes."""
        self._idle.add(connection)
        try:
            async with asyncio.timeout(self.bounds.idle):
                return await connection.recv()
        except TimeoutError as error:
            raise Fault(
                f"nothing came for {self.bounds.idle:g} s", where="the connection", remedy="connect again"
            ) from error
        finally:
            self._idle.discard(connection)

    async def _answer(self, connection: Any, future: Future[Answer]) -> Answer | None:
        """None where the client is gone. Raises what the policy does, and `Fault` where it takes too long."""
        gone = asyncio.ensure_future(connection.wait_closed())
        answer = asyncio.wrap_future(future)
        try:
            await asyncio.wait({gone, answer}, timeout=self.bounds.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                return None
            raise Fault(
                f"there was no answer in {self.bounds.timeout:g} s",
                where="the server",
                remedy="ask less often, or raise its timeout",
            )
        finally:
            gone.cancel()
            answer.cancel()

    async def _send(self, connection: Any, message: bytes | str) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await connection.send(message)

    async def _refuse(self, connection: Any, error: Explained) -> None:
        """The error as a text, and the end."""
        log.warning("%s: %s", _name(connection), ascii(str(error).partition("\n")[0])[1:-1][:LOGGED])
        try:
            await self._send(connection, str(error))
            await connection.close(INTERNAL_ERROR, "an error: see the message before")
        except (self._closed, TimeoutError):
            connection.transport.abort()


def _reply(answer: Answer, spent: float, before: float | None) -> dict[str, Any]:
    timing: dict[str, float] = {"infer_ms": 1000 * spent, "wait_ms": 1000 * answer.waited}
    timing["batch_size"] = answer.batch_size
    if before is not None:
        timing["prev_total_ms"] = 1000 * before
    return {
        "actions": answer.actions,
        "server_timing": timing,
        "policy_timing": {"infer_ms": 1000 * answer.computed},
    }


def _name(connection: Any) -> str:
    address = connection.remote_address
    return f"client {address[0]}:{address[1]}" if address else "a client"
