"""Who may connect, and how many: a stranger's connections make room for others, those of clients don't."""

from __future__ import annotations

import hmac
import http
import logging
from typing import Any

from opentau_train.deploy.serving.wire import library
from opentau_train.errors import UserError

SCHEMES = ("Api-Key", "Bearer")
"""How a token may stand in the header `Authorization`: as openpi-client sends it, and as others do."""
MIN_TOKEN = 16
"""Characters of a token. Shorter ones are guessed."""


class Gate:
    """At most `limit` connections, those whose handshake isn't over among them. One more costs the oldest stranger its
    place: one that has not shown the `token` or, where there is none, never sent an observation. Where there is no
    stranger, the new one is dropped. So whoever only connects, however often, can't keep clients from being served."""

    def __init__(self, limit: int, token: str | None):
        self.limit, self.token = limit, token
        self._known: dict[Any, bool] = {}
        """{connection: whether it is no stranger}, the oldest first"""
        self.num_dropped = self.num_refused = 0

    def enter(self, connection: Any) -> None:
        """A connection begins. It, or another one, may be aborted."""
        if len(self._known) >= self.limit:
            self.num_dropped += 1
            stranger = next((c for c, known in self._known.items() if not known), None)
            if stranger is None:
                connection.transport.abort()
                return
            del self._known[stranger]
            stranger.transport.abort()
        self._known[connection] = False

    def leave(self, connection: Any) -> None:
        """It is over."""
        self._known.pop(connection, None)

    def know(self, connection: Any) -> None:
        """It is no stranger: it has shown the token, or sent an observation that could be read."""
        if connection in self._known:
            self._known[connection] = True

    def admits(self, authorization: str | None) -> bool:
        """Whether the header's value shows the token. Takes as long for a wrong one that begins rightly."""
        if self.token is None:
            return True
        scheme, _, shown = (authorization or "").partition(" ")
        given = shown.strip().encode(errors="surrogateescape")  # headers are read so, byte for byte
        right = hmac.compare_digest(given, self.token.encode())
        if not (right and scheme in SCHEMES):
            self.num_refused += 1
            return False
        return True


def check_token(token: str, where: str) -> str:
    """The token without white space around it. Raises `UserError` for one that is easily guessed."""
    token = token.strip()
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"the token is not {MIN_TOKEN} or more ASCII characters without spaces",
            where=where,
            remedy="make one: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    return token


def connections(gate: Gate) -> Any:
    """The factory of websockets' connections that pass through the `gate`."""

    class Connection(library("websockets.asyncio.server").ServerConnection):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            gate.enter(self)

        def connection_lost(self, exc: Exception | None) -> None:
            gate.leave(self)
            super().connection_lost(exc)

    return Connection


def quiet_logger() -> logging.Logger:
    """Nothing of what strangers do wrong, each with a traceback: the server tells what matters itself."""
    logger = logging.getLogger("opentau_train.deploy.serving.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger


def response(connection: Any, gate: Gate, request: Any, healthy: bool) -> Any:
    """What a request gets in place of a websocket: `/healthz` its answer, one without the token a refusal; None:
    nothing."""
    if request.path == "/healthz":
        status = http.HTTPStatus.OK if healthy else http.HTTPStatus.SERVICE_UNAVAILABLE
        return connection.respond(status, "OK\n" if healthy else "the last batch failed\n")
    shown = request.headers.get_all("Authorization")
    if not gate.admits(shown[0] if len(shown) == 1 else None):
        return connection.respond(http.HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Api-Key TOKEN\n")
    if gate.token is not None:
        gate.know(connection)
    return None
