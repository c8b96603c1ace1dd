"""A client of the server, for this program's own tools; robots use openpi-client."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.deploy.serving.wire import library, pack, unpack
from opentau_train.errors import UserError

MAX_REPLY = 64 * 2**20
"""Bytes of what a server may send."""


class Client:
    """A connection to the policy server at `url` (ws://HOST:PORT), which must be shown a `token` or None. Close it.

    `metadata`: what the server tells of its policy, see `Terms.metadata`. Raises `UserError` where none answers.
    """

    def __init__(self, url: str, token: str | None = None, seconds: float = 60.0):
        self.url, self._seconds, self._open = url, seconds, ExitStack()
        exceptions = library("websockets.exceptions")
        self._closed = exceptions.ConnectionClosed
        headers = None if token is None else {"Authorization": f"Api-Key {token}"}
        try:
            connecting = library("websockets.sync.client").connect(
                url, compression=None, max_size=MAX_REPLY, additional_headers=headers
            )
            self._connection = self._open.enter_context(connecting)
            self.metadata = self._receive()
        except exceptions.InvalidStatus as error:
            if error.response.status_code == 401:
                raise self._error("the server asks for a token", "set token_file to a file with it") from error
            raise self._error(f"no policy server is there: HTTP {error.response.status_code}") from error
        except (OSError, TimeoutError, exceptions.WebSocketException, exceptions.InvalidURI) as error:
            raise self._error(f"no server answers: {str(error) or type(error).__name__}") from error

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to an observation; its `actions` are [T, A'] f32 in the robot's units. Raises `UserError` with what
        the server answers else."""
        try:
            self._connection.send(pack(observation))
            reply = self._receive()
        except (self._closed, OSError, TimeoutError) as error:
            raise self._error(f"the server is gone: {str(error) or type(error).__name__}") from error
        actions = reply.get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype != np.float32:
            raise self._error("the server gives no actions [T, A] of float32", "connect to a policy server")
        return reply

    def act(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """The actions of `infer`."""
        return self.infer(observation)["actions"]

    def close(self) -> None:
        self._open.close()

    def _receive(self) -> dict[str, Any]:
        message = self._connection.recv(timeout=self._seconds)
        if isinstance(message, str):
            what, *rest = message.splitlines() or [""]
            remedy = next((line.partition("remedy:")[2].strip() for line in rest if "remedy:" in line), "")
            raise self._error(f"the server answers: {what}", remedy)
        return unpack(message)

    def _error(self, what: str, remedy: str = "start one: python -m opentau_train.tools.serve") -> UserError:
        return UserError(what, where=self.url, remedy=remedy)
