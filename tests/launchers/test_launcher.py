"""`launchers/train_droid_policy.sh` keeps the contract of its header comment.

Everything is real but `torchrun`, which stands first on PATH as a script that records how it was called; the last
test runs the real one.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import on_path
from tests.droid_datasets import write_cosmos, write_droid

REPO = Path(__file__).parents[2]
LAUNCHER = REPO / "launchers" / "train_droid_policy.sh"
HEAD = ["-m", "opentau_train", "+recipe=droid_policy"]

FAKE_TORCHRUN = r"""#!/usr/bin/env bash
printf '%s\0' "$@" >"$RECORD.part"
printf '%s' "$DROID_ROOT" >"$RECORD.droid_root"
mv "$RECORD.part" "$RECORD"
echo "fake output"
echo "fake error" >&2
if [[ -n ${FAKE_WAITS:-} ]]; then
  for name in TERM INT HUP QUIT; do
    trap "echo got $name; exit 75" "$name"
  done
  echo $$ >"$RECORD.pid.part" && mv "$RECORD.pid.part" "$RECORD.pid"
  for ((i = 0; i < 200; i++)); do sleep 0.05; done # a launcher that hands nothing on fails, it does not hang
fi
exit "${FAKE_STATUS:-0}"
"""


@dataclass
class Node:
    """A machine to launch on: its environment, and what the fake torchrun recorded."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        return self.path / "record"

    @property
    def arguments(self) -> list[str]:
        """torchrun's arguments."""
        return self.record.read_bytes().decode().split("\0")[:-1]

    @property
    def overrides(self) -> list[str]:
        """torchrun's arguments after `+recipe=droid_policy`."""
        at = self.arguments.index("-m")
        assert self.arguments[at : at + 3] == HEAD
        return self.arguments[at + 3 :]

    def log(self, number: int = 0) -> str:
        return (self.path / "logs" / f"train_droid_policy.node{number}.log").read_text()

    def run(self, *command: object, cwd: Path | None = None, **variables: object) -> subprocess.CompletedProcess:
        """Execute the launcher (or `command`) with `variables` added to the environment."""
        return subprocess.run(
            [*map(str, command)] or [str(LAUNCHER)],
            env=self.environment | {k: str(v) for k, v in variables.items()},
            cwd=cwd or self.path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def source(self, script: str, **variables: object) -> subprocess.CompletedProcess:
        """Run a bash script in which `launch` sources the launcher."""
        text = f"launch() {{ source {shlex.quote(str(LAUNCHER))}; }}\n{script}"
        return self.run("bash", "-c", text, "caller", "argument-of-the-caller", **variables)

    def refuses(self, *texts: str, **variables: object) -> None:
        """The launcher exits 2 with what, where and remedy at the end of stderr, starts nothing and writes no log."""
        answer = self.run(**variables)
        assert answer.returncode == 2, answer.stderr
        what, where, remedy = answer.stderr.splitlines()[-3:]
        assert what.startswith("error: ") and where.startswith("  where:  ") and remedy.startswith("  remedy: ")
        for text in texts:
            assert text in answer.stderr
        assert not self.record.exists() and not (self.path / "logs").exists()


@pytest.fixture(scope="session")
def datasets(tmp_path_factory) -> Path:
    """A directory of small datasets: `my droid`, and a release by outcome, `cosmos`."""
    root = tmp_path_factory.mktemp("datasets")
    write_droid(root / "my droid")
    write_cosmos(root / "cosmos" / "success")
    write_cosmos(root / "cosmos" / "failure", "failure")
    return root


@pytest.fixture
def node(tmp_path: Path, datasets: Path) -> Node:
    fake = tmp_path / "bin" / "torchrun"
    fake.parent.mkdir()
    fake.write_text(FAKE_TORCHRUN)
    fake.chmod(0o755)
    made = Node(tmp_path)
    made.environment = {
        "PATH": f"{fake.parent}:{on_path.folder()}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(REPO),
        "DATASET_PATH": str(datasets / "my droid"),
        "RECORD": str(made.record),
        "CHECK_CONFIG": "0",  # most overrides here are made up; the tests of the check set it
    }
    return made


@pytest.mark.slow
def test_a_mistake_in_the_configuration_ends_before_torchrun_starts(node):
    answer = node.run(CHECK_CONFIG="1", EXTRA_TAIL_OVERRIDES="model.widht=5")
    assert answer.returncode == 2 and "unknown key 'model.widht'" in answer.stderr
    assert len(answer.stderr.splitlines()) <= 8 and not node.record.exists()


@pytest.mark.slow
def test_a_release_by_outcome_is_taken_with_its_data_and_the_check_follows_the_overrides(node, datasets):
    """Which datasets the check takes: tests/unit/tools/test_check_composed.py."""
    release = {"DATASET_PATH": datasets / "cosmos", "BASE_CHECKPOINT_PATH": "/weights", "CHECK_CONFIG": "1"}
    answer = node.run(**release, EXTRA_TAIL_OVERRIDES="data=droid_cosmos")
    assert answer.returncode == 0, answer.stderr
    assert "droid_failure: 0 windows of 0 episodes" in answer.stdout and node.overrides == ["data=droid_cosmos"]
    assert "note: the environment variable BASE_CHECKPOINT_PATH is not read" in answer.stderr
    node.record.unlink(), (node.path / "logs").rename(node.path / "old")
    node.refuses("observation.images.wrist_left", "has the droid_cosmos schema", **release)
    node.refuses("unset VLM_SAFETENSORS_PATH", **release, VLM_SAFETENSORS_PATH="/weights")


TOPOLOGY = {
    "NPROC_PER_NODE": ("8", "--nproc-per-node"),
    "NNODES": ("2", "--nnodes"),
    "NODE_RANK": ("1", "--node-rank"),
    "MASTER_ADDR": ("node0", "--master-addr"),
    "MASTER_PORT": ("29400", "--master-port"),
}


@pytest.mark.parametrize(
    "names", [(), tuple(TOPOLOGY), ("NPROC_PER_NODE",), ("MASTER_ADDR",), ("MASTER_PORT",)], ids=lambda n: "+".join(n)
)
@pytest.mark.parametrize("others", [None, ""], ids=["unset", "empty"])
def test_a_topology_variable_becomes_its_option_in_order_only_where_it_is_set(node, names, others):
    """An empty variable counts as unset."""
    everything = (*TOPOLOGY, "RUN_DIR", "LOG_DIR", "EXTRA_TAIL_OVERRIDES", "PYTHON")
    variables = {} if others is None else dict.fromkeys(everything, others)
    answer = node.run(**variables | {name: TOPOLOGY[name][0] for name in names})
    assert answer.returncode == 0, answer.stderr
    assert node.arguments == [word for name in names for word in reversed(TOPOLOGY[name])] + HEAD


def test_several_nodes_without_a_rank_are_node_0_and_it_says_so(node):
    answer = node.run(NNODES=2, MASTER_ADDR="node0")
    assert answer.returncode == 0
    assert node.arguments == ["--nnodes", "2", "--master-addr", "node0", *HEAD]
    assert "NODE_RANK is not set" in answer.stderr


def test_extra_overrides_are_split_with_quotes_respected(node):
    extra = """trainer.steps=5 "name=my run"  'a="b c"'\tb=\\ c\nd="it's" '' e=#f"""
    assert node.run(EXTRA_TAIL_OVERRIDES=extra).returncode == 0
    assert node.overrides == ["trainer.steps=5", "name=my run", 'a="b c"', "b= c", "d=it's", "", "e=#f"]


@pytest.mark.parametrize(
    "text", ["a=$(touch ran)", "a=`touch ran`", "a=${HOME}", "a=*", "a=~", "a;touch${IFS}ran", "a|b&c"]
)
def test_extra_overrides_are_never_expanded_or_executed(node, text):
    assert node.run(EXTRA_TAIL_OVERRIDES=f'"{text}"').returncode == 0
    assert node.overrides == [text]
    assert not (node.path / "ran").exists()


@pytest.mark.parametrize("text", ["name='my run", 'a="', "a=\\"])
def test_unbalanced_quotes_are_refused(node, text):
    answer = node.run(EXTRA_TAIL_OVERRIDES=text)
    assert answer.returncode == 2
    assert "EXTRA_TAIL_OVERRIDES" in answer.stderr and "Traceback" not in answer.stderr
    assert not node.record.exists()


def test_a_file_of_the_working_directory_cannot_replace_the_splitter(node):
    (node.path / "shlex.py").write_text("raise SystemExit('shadowed')")
    assert node.run(EXTRA_TAIL_OVERRIDES="a=1 b=2").returncode == 0
    assert node.overrides == ["a=1", "b=2"]


def test_a_sourcing_scripts_array_is_kept_and_extra_overrides_follow(node):
    answer = node.source("TAIL_OVERRIDES=(a=1 'b=x y' 'c=$(id)'); launch", EXTRA_TAIL_OVERRIDES="d=1 a=2")
    assert answer.returncode == 0, answer.stderr
    assert node.overrides == ["a=1", "b=x y", "c=$(id)", "d=1", "a=2"]


@pytest.mark.parametrize("options", ["", "set -eu", "set -euo pipefail"])
def test_sourcing_returns_torchruns_status_to_the_script(node, options):
    assert node.source(f"{options}\nlaunch || echo status=$?", FAKE_STATUS=9).stdout.endswith("status=9\n")
    assert node.source(f"{options}\nlaunch", FAKE_STATUS=9).returncode == 9


def test_sourcing_survives_an_error_and_takes_no_argument_of_the_script(node):
    answer = node.source("launch || echo status=$?", NNODES="many")
    assert answer.stdout.endswith("status=2\n")
    assert node.source("launch").returncode == 0
    assert node.overrides == []


def test_sourcing_leaves_the_scripts_traps_and_options_alone(node):
    script = (
        "trap 'echo mine' TERM; before=$-; launch >out; [[ $- == \"$before\" ]] && kill -TERM $$ && trap -p TERM INT"
    )
    assert node.source(script).stdout == "mine\ntrap -- 'echo mine' SIGTERM\n"


def test_arguments_come_last(node):
    assert node.run(LAUNCHER, "c=3", "d=x y", EXTRA_TAIL_OVERRIDES="b=2").returncode == 0
    assert node.overrides == ["b=2", "c=3", "d=x y"]


@pytest.mark.parametrize(
    ("run_dir", "override"),
    [
        ("/runs/a-1_b.c", "paths.run_dir=/runs/a-1_b.c"),
        ("/runs/my run,x=1", "paths.run_dir='/runs/my run,x=1'"),
        ("/runs/it's", "paths.run_dir='/runs/it\\'s'"),
    ],
)
def test_run_dir_becomes_an_override_that_hydra_reads_back(node, run_dir, override):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert node.run(RUN_DIR=run_dir, EXTRA_TAIL_OVERRIDES="a=1").returncode == 0
    assert node.overrides == [override, "a=1"]
    assert OverridesParser.create().parse_override(override).value() == run_dir


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137])
def test_the_exit_status_is_torchruns(node, status):
    assert node.run(FAKE_STATUS=status).returncode == status


def test_one_line_shows_the_command_as_a_shell_would_take_it(node):
    answer = node.run(NPROC_PER_NODE=2, EXTRA_TAIL_OVERRIDES='"name=my run" a=$b')
    lines = [line for line in answer.stdout.splitlines() if line.startswith("+ torchrun")]
    assert len(lines) == 1
    assert shlex.split(lines[0])[2:] == node.arguments == ["--nproc-per-node", "2", *HEAD, "name=my run", "a=$b"]


def test_the_log_holds_all_output_and_a_second_run_is_appended(node):
    assert "fake output\nfake error\n" in node.run(FAKE_STATUS=3).stdout
    first = node.log()
    assert first == "+ torchrun -m opentau_train +recipe=droid_policy\nfake output\nfake error\n"
    node.run()
    assert node.log() == first * 2


def test_every_node_has_its_own_log(node):
    for number in range(2):
        node.run(NNODES=2, NODE_RANK=number, MASTER_ADDR="node0", LOG_DIR=node.path / "deep" / "logs")
    names = {p.name for p in (node.path / "deep" / "logs").iterdir()}
    assert names == {"train_droid_policy.node0.log", "train_droid_policy.node1.log"}


def test_a_log_that_cannot_be_written_is_refused(node):
    (node.path / "file").touch()
    answer = node.run(LOG_DIR=node.path / "file")
    assert answer.returncode == 2 and "LOG_DIR" in answer.stderr
    assert not node.record.exists()


@pytest.mark.slow
def test_it_works_from_any_directory_and_with_relative_paths(node, datasets):
    elsewhere = node.path / "else where"
    elsewhere.mkdir()
    (node.path / "my droid").symlink_to(datasets / "my droid")
    answer = node.run(cwd=elsewhere, DATASET_PATH="../my droid", CHECK_CONFIG="1")
    assert answer.returncode == 0, answer.stderr
    assert "4 episodes, 130 frames, 15 fps" in answer.stdout  # said before anything starts
    assert (node.path / "record.droid_root").read_text() == "../my droid"
    assert (elsewhere / "logs" / "train_droid_policy.node0.log").exists()


@pytest.mark.slow
def test_a_dataset_on_a_server_is_checked_there(node, datasets):
    url = f"file://{datasets / 'my droid'}"
    answer = node.run(DATASET_PATH=url, CHECK_CONFIG="1", OPENTAU_CACHE=node.path / "cache")
    assert answer.returncode == 0, answer.stderr
    assert "4 episodes, 130 frames, 15 fps" in answer.stdout
    assert (node.path / "record.droid_root").read_text() == url


def test_python_names_the_interpreter(node):
    interpreter = node.path / "my python"
    interpreter.write_text(
        f'#!/usr/bin/env bash\necho "$@" >>{shlex.quote(str(node.path))}/calls\n'
        f'[[ $1 == -m ]] || exec {sys.executable} "$@"\n'
    )
    interpreter.chmod(0o755)
    assert node.run(PYTHON=interpreter, CHECK_CONFIG="1").returncode == 0
    assert "-m opentau_train.tools.check +recipe=droid_policy\n" in (node.path / "calls").read_text()


SLURM_STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "n[7-10]",
    "SLURM_NODEID": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURMD_NODENAME": "n9",
}
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show hostnames n[7-10]") printf 'n%s\\n' 7 8 9 10 ;;
  "show node n7 --oneliner") echo "NodeName=n7 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=n7" ;;
  *) exit 1 ;;
esac
"""


def test_inside_a_slurm_step_the_topology_comes_from_it_unless_given(node):
    scontrol = node.path / "bin" / "scontrol"
    scontrol.write_text(FAKE_SCONTROL)
    scontrol.chmod(0o755)
    assert node.run(**SLURM_STEP).returncode == 0
    topology = ["--nproc-per-node", "8", "--nnodes", "4", "--node-rank", "2", "--master-addr", "10.0.0.7"]
    assert node.arguments == [*topology, "--master-port", "23456", *HEAD]
    given = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "node0", "MASTER_PORT": 5, "NPROC_PER_NODE": 3}
    assert node.run(**SLURM_STEP, **given).returncode == 0
    topology = ["--nproc-per-node", "3", "--nnodes", "2", "--node-rank", "1", "--master-addr", "node0"]
    assert node.arguments == [*topology, "--master-port", "5", *HEAD]
    # Logged in on a node of the job, but not in a step of it: a single node.
    assert node.run(SLURM_JOB_ID=1, SLURM_NNODES=4).returncode == 0
    assert node.arguments == HEAD


def test_with_a_rendezvous_id_the_nodes_meet_by_c10d_and_the_first_one_hosts(node):
    common = {"NNODES": 2, "MASTER_ADDR": "node0", "MASTER_PORT": 29400, "RDZV_ID": "7.1"}
    for number in (0, 1):
        assert node.run(**common, NODE_RANK=number, LOCAL_ADDR=f"node{number}").returncode == 0
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "7.1", "--rdzv-endpoint", "node0:29400"]
        conf = ["--rdzv-conf", f"is_host={1 - number}", "--local-addr", f"node{number}"]
        assert node.arguments == ["--nnodes", "2", *rendezvous, *conf, *HEAD]


@pytest.mark.parametrize("name", ["NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "1 2", "08", "1:4", "$(id)", "9" * 30])
def test_a_number_that_is_none_is_refused(node, name, value):
    node.refuses(f"{name} must be an integer", value, **{"MASTER_ADDR": "node0", name: value})


@pytest.mark.parametrize(
    ("texts", "variables"),
    [
        (["NNODES must be an integer of at least 1"], {"NNODES": "0"}),
        (["NPROC_PER_NODE must be an integer of at least 1"], {"NPROC_PER_NODE": "0"}),
        (["MASTER_PORT must be an integer of at least 1"], {"MASTER_PORT": "0"}),
        (["NODE_RANK", "NNODES"], {"NODE_RANK": "2", "NNODES": "2", "MASTER_ADDR": "node0"}),
        (["NODE_RANK", "NNODES"], {"NODE_RANK": "1", "MASTER_ADDR": "node0"}),
        (["NODE_RANK", "NNODES"], {"NODE_RANK": "10", "NNODES": "9", "MASTER_ADDR": "node0"}),
        (["MASTER_ADDR", "node 0"], {"NNODES": "2", "NODE_RANK": "1"}),
        (["DATASET_PATH is not set"], {"DATASET_PATH": ""}),
        (["doesn't exist"], {"DATASET_PATH": "nowhere", "CHECK_CONFIG": "1"}),
        (["'no-such-python'", "PYTHON"], {"PYTHON": "no-such-python"}),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(node, texts, variables):
    node.refuses(*texts, **variables)


INTERPRETER = """#!/usr/bin/env bash
if [[ $1 == -I && $3 == *torch* ]]; then exit "$LACKS_TORCH"; fi
[[ $2 == torch.distributed.run ]] || exec {python} "$@"
shift 2
exec {torchrun} "$@"
"""


@pytest.mark.parametrize("lacks_torch", [0, 1])
def test_without_torchrun_on_path_it_is_started_as_a_module_if_there_is_torch(node, lacks_torch):
    torchrun = (node.path / "bin" / "torchrun").rename(node.path / "bin" / "elsewhere")
    python = node.path / "bin" / "interpreter"
    python.write_text(INTERPRETER.format(python=sys.executable, torchrun=torchrun))
    python.chmod(0o755)
    place = {"PATH": f"{node.path / 'bin'}:/usr/bin:/bin", "PYTHON": python, "LACKS_TORCH": lacks_torch}
    if lacks_torch:
        return node.refuses("'torchrun'", "PATH", **place)
    answer = node.run(NPROC_PER_NODE=2, **place)
    assert answer.returncode == 0, answer.stderr
    assert node.arguments == ["--nproc-per-node", "2", *HEAD]
    assert f"+ {python} -m torch.distributed.run --nproc-per-node 2" in answer.stdout


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
@pytest.mark.parametrize("how", ["executed", "sourced", "group"])
def test_a_signal_reaches_torchrun_once_and_no_process_is_left(node, name, how):
    command = ["bash", "-c", f"source {LAUNCHER}"] if how == "sourced" else [str(LAUNCHER)]
    environment = node.environment | {"FAKE_WAITS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, cwd=node.path, stdout=pipe, text=True, start_new_session=True
    ) as launcher:
        pid = int(wait_for(node.path / "record.pid", launcher))
        send = os.killpg if how == "group" else os.kill  # a terminal's Ctrl-C and `timeout` signal the group
        send(launcher.pid, getattr(signal, name))
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 75
    assert output.count("got") == node.log().count("got") == 1
    assert f"got {name[3:]}\n" in output and f"got {name[3:]}\n" in node.log()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_log_is_complete_when_the_launcher_returns(node):
    slow = node.path / "bin" / "tee"
    slow.write_text('#!/usr/bin/env bash\nsleep 0.3\nexec /usr/bin/tee "$@"\n')
    slow.chmod(0o755)
    with open(node.path / "stdout", "w") as stdout:  # a file: a pipe would wait for tee itself
        subprocess.run([LAUNCHER], env=node.environment, cwd=node.path, stdout=stdout, check=True)
    assert node.log().endswith("fake error\n")
    assert (node.path / "stdout").read_text().endswith(node.log())


def wait_for(path: Path, process: subprocess.Popen) -> str:
    """The text of a file that `process` is about to write."""
    while not path.exists():
        assert process.poll() is None, "the process ended before it wrote the file"
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_launcher_trains_for_real_with_two_processes(tmp_path):
    from opentau_train.data.builtin.droid import ensure_droid_sample

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node = Node(tmp_path)
    node.environment = {
        **os.environ,
        "PATH": f"{on_path.folder()}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "DATASET_PATH": str(ensure_droid_sample(Path("~/.cache/opentau_train").expanduser())["joint"]),
        "NPROC_PER_NODE": "2",
        "MASTER_PORT": str(port),
        "RUN_DIR": str(tmp_path / "my run"),
        "EXTRA_TAIL_OVERRIDES": "+debug=smoke",
    }
    launch = subprocess.run([LAUNCHER], env=node.environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert launch.returncode == 0, launch.stdout + launch.stderr
    assert f"--nproc-per-node 2 --master-port {port} -m opentau_train" in launch.stdout
    metrics = [json.loads(line) for line in (tmp_path / "my run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics
    assert (tmp_path / "my run" / "checkpoints" / "00000002").is_dir()
