"""A simulator in a process of its own, which may crash or hang without the caller.

    simulator = SimulatorProcess(tree, timeout=60.0)
    simulator.ask("reset", seed); seen = simulator.answer()

A process is started anew, not forked (the caller holds torch's threads), and ends when the caller does. Gymnasium's own
AsyncVectorEnv ends with the first of its processes; here each is replaced by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

from opentau_train.errors import Explained
from opentau_train.simulation.simulator import Simulator

START_SECONDS = 300.0
"""How long a simulator may take to be made: imports from a busy file server are slow."""


class SimulatorLost(Exception):
    """The simulator's process crashed or hung; the text says which, with its last words."""


class SimulatorProcess:
    """The process of the environment that `tree` declares. Requests are answered in order; `timeout` seconds are the
    longest that one may take."""

    def __init__(self, tree: dict[str, Any], timeout: float):
        self.timeout = timeout
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._connection, theirs = Pipe()
        path = os.pathsep.join(filter(None, sys.path))
        # Off-screen rendering without a display; the user's own choice goes before.
        egl = {"MUJOCO_GL": "egl"} if sys.platform == "linux" else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            env={**egl, **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,  # held open, for `_end_with_caller`
            stdout=self._words,
            stderr=self._words,
        )
        theirs.close()
        self._opening = True
        self._send(tree)

    def ask(self, method: str, *arguments: Any) -> None:
        """Call a method of `Simulator` there. A process that is gone is noticed by `answer`."""
        self._send((method, arguments))

    def answer(self) -> Any:
        """What the oldest call that wasn't answered returned. Raises `SimulatorLost`, and the `UserError` of the
        call."""
        if self._opening:
            self._opening = False
            self._receive(START_SECONDS)
        return self._receive(self.timeout)

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it is gone: `_receive` says how
            self._connection.send(message)

    def _receive(self, timeout: float) -> Any:
        try:
            if not self._connection.poll(timeout):
                raise SimulatorLost(f"it hung: no answer within {timeout:g} s{self._last_words()}")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise SimulatorLost(f"it crashed with {how}{self._last_words()}") from error
        if isinstance(answer, Explained):
            raise answer
        return answer

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def serve(connection: Connection) -> None:
    """Answer requests until the caller is gone. What isn't `Explained` ends the process with its traceback."""
    simulator: Simulator | None = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            if simulator is None:
                simulator, answer = Simulator(message), None
            else:
                method, arguments = message
                answer = getattr(simulator, method)(*arguments)
        except Explained as error:
            answer = error
        connection.send(answer)


def _end_with_caller() -> None:
    """Stdin ends with the caller, however it came: a simulator that hangs then would stay for ever."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_caller, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, whose end ends this process
    serve(Connection(int(sys.argv[1])))
