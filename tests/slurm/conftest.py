"""A SLURM cluster of two nodes on this machine: real munged, slurmctld and slurmd, on loopback, ended by their ids."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.program import REPO, environment

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job is held back for as long as a credential is valid, two minutes by default.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
JobRequeue=1
# Jobs of two clusters on one machine must not derive the same port from their numbers.
FirstJobId={first_job}
MpiDefault=none
KillWait=30
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    root: Path
    env: dict[str, str]

    def call(self, *command: str, cwd: Path | None = None, **extra: str) -> str:
        done = subprocess.run(
            command, env=self.env | extra, cwd=cwd or self.root, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, **extra: str) -> str:
        """sbatch; returns the job's number."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd, **extra).strip()

    def state(self, job: str) -> dict[str, str]:
        text = self.call("scontrol", "show", "job", job, "--oneliner")
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, done, seconds: float = 300) -> dict[str, str]:
        """Wait until `done(state)`; fails with the last words of job and daemons, at once when the job has ended."""
        end = time.monotonic() + seconds
        while not done(state := self.state(job)):
            if time.monotonic() > end or state["JobState"] in ENDED:
                logs = [*self.root.glob("*.log"), Path(state["StdOut"])]
                said = "\n".join(f"== {p.name}\n{p.read_text()[-2500:]}" for p in logs if p.exists())
                raise AssertionError(f"{said}\njob {job} is {state['JobState']}, waited for something else")
            time.sleep(0.5)
        return state


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = [c for c in COMMANDS if shutil.which(c, path=PATH) is None]
    if missing or os.geteuid() != 0:
        why = f"{', '.join(missing)} not found: apt-get install slurm-wlm munge" if missing else "it needs root"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(f"no SLURM cluster can be started here: {why}")
        pytest.skip(f"left out: no SLURM cluster can be started here: {why}")
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket has a limit of 107 characters
    root.chmod(0o755)
    started: list[subprocess.Popen] = []
    try:
        yield _start(root, started)
    finally:
        _stop(root, started)


def _start(root: Path, started: list[subprocess.Popen]) -> Cluster:
    host = socket.gethostname().split(".")[0]
    values = {"host": host, "root": root, "ports": _three_free_ports(), "first_job": os.getpid() % 9900 + 1}
    (root / "slurm.conf").write_text(CONF.format(**values))
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o600)
    for name in ("state", "n1", "n2"):
        (root / name).mkdir()
    # The venv's own programs first: the job runs `python` and `torchrun` from PATH.
    env = environment(PATH=f"{Path(sys.executable).parent}:{PATH}")
    env = {k: v for k, v in env.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    env["SLURM_CONF"] = str(root / "slurm.conf")
    cluster = Cluster(root, env)

    def daemon(*command: str) -> None:
        with open(root / f"{command[0]}.{len(started)}.out", "w") as out:
            started.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=root))

    def said(*command: str) -> str:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout.strip()

    files = ("socket", "key-file", "pid-file", "log-file", "seed-file")
    munge = [f"--{name}={root}/munge.{name.removesuffix('-file')}" for name in files]
    daemon("munged", "--foreground", "--force", *munge)
    _until(lambda: (root / "munge.socket").exists(), root)
    daemon("slurmctld", "-D", "-f", str(root / "slurm.conf"))
    # A slurmd that finds no controller asks again only after minutes.
    _until(lambda: "is UP" in said("scontrol", "ping"), root)
    for node in ("n1", "n2"):
        daemon("slurmd", "-D", "-f", str(root / "slurm.conf"), "-N", node)

    _until(lambda: said("sinfo", "-h", "-o", "%D %t") == "2 idle", root)
    return cluster


def _stop(root: Path, started: list[subprocess.Popen]) -> None:
    env = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
    if len(started) > 1:
        subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, timeout=60)
        time.sleep(2)
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(root, ignore_errors=True)


def _three_free_ports() -> list[int]:
    """Three ports in a row."""
    for first in range(17000 + os.getpid() % 1000 * 3, 30000, 3):
        ports = [first, first + 1, first + 2]
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return ports
    raise AssertionError("no free ports")


def _until(holds, root: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            said = "\n".join(
                f"== {p.name}\n{p.read_text()[-2000:]}" for p in [*root.glob("*.out"), *root.glob("*.log")]
            )
            raise AssertionError(f"the cluster did not come up\n{said}")
        time.sleep(0.1)


@pytest.fixture
def sbatch() -> str:
    return str(REPO / "launchers" / "slurm" / "train.sbatch")
