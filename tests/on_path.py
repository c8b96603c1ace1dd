"""`python` and `torchrun` for the PATH of scripts that tests run: their `-m MODULE` begins with the imports done.

The command that the script starts hands its arguments, directory, environment and streams to this process, which starts
a process of tests/warm.py with them. It passes signals on, and ends as that process does.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

from tests import warm

MODULES = {"python": [], "torchrun": ["-m", warm.TORCHRUN]}
"""{command: the arguments that it puts before those it is called with}."""

SHIM = """#!{python} -SE
import json, os, signal, socket, sys
arguments = {before!r} + sys.argv[1:]
if arguments[:1] != ["-m"]:
    os.execv({python!r}, [{python!r}, *arguments])
asking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
asking.connect({address!r})
request = json.dumps([arguments, os.getcwd(), dict(os.environ)])
socket.send_fds(asking, [request.encode()], [0, 1, 2])
pid = int(asking.recv(64))
for name in ("TERM", "INT", "HUP", "QUIT"):
    signal.signal(getattr(signal, "SIG" + name), lambda number, _: os.kill(pid, number))
code = int(asking.recv(64))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@cache
def folder() -> Path:
    """A directory of these commands, good as long as this process runs."""
    made = Path(tempfile.mkdtemp(prefix="on_path"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    door.bind(str(made / "door"))
    door.listen()
    for name, before in MODULES.items():
        (made / name).write_text(SHIM.format(python=sys.executable, before=before, address=str(made / "door")))
        (made / name).chmod(0o755)
    threading.Thread(target=_serve, args=[door], daemon=True).start()
    return made


def _serve(door: socket.socket) -> None:
    while True:
        threading.Thread(target=_start, args=[door.accept()[0]], daemon=True).start()


def _start(asking: socket.socket) -> None:
    """Start what one command asks for, and tell it the pid and the exit code."""
    message, streams, _, _ = socket.recv_fds(asking, warm.MESSAGE, 3)
    arguments, cwd, env = json.loads(message)
    stdin, stdout, stderr = streams
    process = warm.Popen([sys.executable, *arguments], cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr)
    for stream in streams:
        os.close(stream)
    asking.send(str(process.pid).encode())
    asking.send(str(process.wait()).encode())
    asking.close()
