"""Processes that begin with the program's imports done: importing torch is nine tenths of what a small run costs. A
third of the rest is composing and rehearsing: what that reads and finds for `tests.program.TOY` is there, too.

`Popen` is subprocess.Popen for a command of this interpreter (`-m MODULE`, `-c CODE` or a script). A helper process has
made the imports once. Each command is a fork of it with a session, environment, directory and streams of its own, a
child of whoever asked: waiting, signals, exit codes and the interpreter's end are the usual ones. torchrun's ranks
and a sweep's runs begin the same way. What differs from a new interpreter: the code that is imported (a test of other
code starts `subprocess.Popen`), what a module read of the environment when it was imported, and PYTHONHASHSEED, which
all share.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pickle
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path

REPO = Path(__file__).parent.parent
TORCHRUN, SWEEP = "torch.distributed.run", "--multirun"
IMPORTS = (
    TORCHRUN,
    "torch._dynamo",  # an optimizer imports it when it is first called
    "torch.utils.tensorboard",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler",
    "torch.utils.serialization.config",
    "numpy.ctypeslib",
    "numpy.ma",
    "pyarrow.compute",
    "xxhash",
    "opentau_train.loop",
    "opentau_train.sweep",
    "opentau_train.validate",
    "opentau_train.data.builtin.droid",
    "opentau_train.data.lerobot.columns",
    "opentau_train.data.lerobot.source",
    "opentau_train.models.flow",
    "opentau_train.sinks.console",
    "opentau_train.sinks.jsonl",
    "opentau_train.sinks.tensorboard",
    "opentau_train.sinks.trackers",
)
WHEN_NAMED = {"pi0": "opentau_train.models.pi.network", "finetune=": "peft"}
"""{a part of an argument: what the first process that has it imports for those to come}: seconds, which few need."""

NAME = b"opentau"
"""What such a process is called in /proc/PID/comm, followed by its rank if it has one."""

MESSAGE = 1 << 20
SET_NAME, SET_CHILD_SUBREAPER = 15, 36
LIBC = ctypes.CDLL(None, use_errno=True)


class Popen(subprocess.Popen):
    """subprocess.Popen of `[sys.executable, ...]`; `pass_fds`, `preexec_fn` and users or groups are not supported."""

    def _execute_child(self, args, *rest):
        *_, pass_fds, cwd, env, _, _, shell = rest[:9]
        pipes, new_session = rest[9:15], rest[20]
        assert args[0] == sys.executable and not pass_fds and not shell, args
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        request = {
            "arguments": [str(a) for a in args[1:]],
            "cwd": os.path.abspath(cwd or "."),
            "env": {str(k): str(v) for k, v in (os.environ if env is None else env).items()},
            "new_session": bool(new_session),
        }
        streams = [own if own != -1 else usual for usual, own in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = helper().start(request, streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def run(command: list, timeout: float | None = None, **options) -> subprocess.CompletedProcess:
    """As subprocess.run(..., text=True, capture_output=True); what outlives `timeout` is killed with its session."""
    pipe = subprocess.PIPE
    with Popen(command, text=True, stdout=pipe, stderr=pipe, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            # Broad, and raised again: whatever ends the waiting, no process must outlive the test.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


class Helper:
    """The asking end of the process that forks."""

    def __init__(self, channel: socket.socket):
        self.channel = channel
        self.lock = threading.Lock()

    def start(self, request: dict, streams: list[int]) -> int:
        """The pid of a new child of this process that runs `request` with `streams` as its 0, 1 and 2."""
        with self.lock:
            LIBC.prctl(SET_CHILD_SUBREAPER, 1)  # whose parent ends meanwhile is this process's child
            try:
                socket.send_fds(self.channel, [json.dumps(request).encode()], streams)
                pid = int(self.channel.recv(MESSAGE) or b"0")
                assert pid and self.channel.recv(MESSAGE) == b"adopted", "the process with the imports has ended"
                return pid
            finally:
                LIBC.prctl(SET_CHILD_SUBREAPER, 0)


_helpers: dict[int, Helper] = {}


def helper() -> Helper:
    """This process's helper, started when it is first asked for; it ends with this process."""
    if os.getpid() not in _helpers:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(there.fileno())]
        subprocess.Popen(command, env=env, pass_fds=[there.fileno()], start_new_session=True)
        there.close()
        _helpers[os.getpid()] = Helper(here)
    return _helpers[os.getpid()]


def serve(channel: socket.socket) -> tuple[dict, list[int]]:
    """Fork for each request. Returns in the new processes only; ends with whoever asks."""
    LIBC.prctl(SET_NAME, b"warm")
    while True:
        message, streams, _, _ = socket.recv_fds(channel, MESSAGE, 3)
        if not message:
            os._exit(0)
        request = json.loads(message)
        import_named(request["arguments"])
        between = os.fork()
        if between == 0:
            between = os.getpid()
            child = os.fork()
            if child == 0:
                while os.getppid() == between:  # until who asked has adopted it: a rank looks for its agent at once
                    time.sleep(0.001)
                return request, streams
            channel.send(str(child).encode())
            os._exit(0)
        os.waitpid(between, 0)
        channel.send(b"adopted")
        for stream in streams:
            os.close(stream)


def import_named(arguments: list[str]) -> None:
    """Import what processes of these arguments will."""
    words = " ".join(arguments)
    modules = {module for part, module in WHEN_NAMED.items() if part in words and module not in sys.modules}
    for module in modules:
        importlib.import_module(module)
    if modules:
        gc.freeze()


def become(request: dict, streams: list[int], path: list[str]) -> None:
    """Make this process what a new one would be: session, directory, environment, streams, import path, chance."""
    for usual, given in enumerate(streams):
        os.dup2(given, usual)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    LIBC.prctl(SET_NAME, NAME + os.environ.get("RANK", "").encode())
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115  they stay open as long as the process lives
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=unbuffered)
    sys.stderr.reconfigure(line_buffering=True)
    own = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [*own, *path]
    random.seed()
    sys.modules["numpy"].random.seed()


def launcher_asks(channel: socket.socket) -> None:
    """torchrun starts its ranks through `channel`, a sweep its runs. The events of torchrun's rendezvous, which nobody
    records here, have no names: finding one goes through all modules, twice."""
    _helpers[os.getpid()] = Helper(channel)
    sys.modules["torch.distributed.elastic.rendezvous.dynamic_rendezvous"].get_method_name = lambda depth=2: ""
    sys.modules["torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"].Popen = Popen
    sys.modules["opentau_train.sweep"].subprocess = types.SimpleNamespace(Popen=Popen)


def execute(arguments: list[str]) -> None:
    """What the interpreter does with its arguments."""
    if arguments[0] == "-u":
        arguments = arguments[1:]
    if arguments[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *arguments[2:]], [""]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    elif arguments[0] == "-m":
        sys.argv, sys.path[:0] = arguments[1:], [os.getcwd()]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = arguments, [str(Path(arguments[0]).resolve().parent)]
        runpy.run_path(arguments[0], run_name="__main__")


def prepare() -> None:
    """Compose and rehearse what most small runs of the tests train."""
    from opentau_train import cli
    from opentau_train.checkpoints.start import new_policy
    from opentau_train.data.mixture.open import open_plan
    from opentau_train.data.mixture.resolve import resolve_sources
    from opentau_train.distributed.memory import footprint
    from opentau_train.distributed.rehearsal import Rehearsal, sketch
    from opentau_train.tools.plan import rehearsed
    from tests import compose_once, rehearse_once
    from tests.program import TOY

    compose_once.remember()
    rehearse_once.remember()
    cli.compose(TOY)
    settings = cli.checked(cli.compose([*TOY, "logger=none"]))
    ours, theirs = os.pipe()
    if os.fork() == 0:  # reading a dataset starts threads
        spec = rehearsed(settings, open_plan(settings, resolve_sources(settings)))._spec
        os.write(theirs, pickle.dumps(spec))
        os._exit(0)
    os.wait()
    spec = pickle.loads(os.read(ours, MESSAGE))
    os.close(ours), os.close(theirs)
    policy = sketch(partial(new_policy, settings.model, spec))
    footprint(Rehearsal(policy, spec, "cpu"), settings, 1)


def main(channel: socket.socket) -> None:
    """Make the imports, then be a new process for each request."""
    own = [*os.environ["PYTHONPATH"].split(os.pathsep), str(Path(__file__).parent)]
    path = [p for p in sys.path if p not in own]
    for module in IMPORTS:
        importlib.import_module(module)
    prepare()
    threads = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    lost = [name for name in threads if name != "jemalloc_bg_thd"]  # that one begins again in a fork by itself
    assert len(lost) == 1, f"only one thread comes through a fork, here are {lost}"
    gc.collect()
    gc.freeze()
    while True:
        request, streams = serve(channel)
        channel.detach()  # its number is another file's from now on, which the end of this object would close
        become(request, streams, path)
        if not {TORCHRUN, SWEEP} & set(request["arguments"][:4]):
            break
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            there.close()
            launcher_asks(here)
            break
        here.close()  # the process that forks torchrun's ranks, or a sweep's runs
        gc.freeze()
        nothing = os.open(os.devnull, os.O_RDWR)
        for usual in range(3):
            os.dup2(nothing, usual)
        channel = there
    execute(request["arguments"])


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
