"""Whatever goes wrong on one rank ends all of them, soon, with a message that says what and where."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from opentau_train.checkpoints.commit import PARTIAL
from opentau_train.checkpoints.contents import RUN as RUN_FILE
from opentau_train.checkpoints.manifest import MANIFEST
from opentau_train.distributed.stopping import MARKER, SENTINEL, StopFlag
from opentau_train.errors import EXIT_FAULT, EXIT_PREEMPTED
from opentau_train.threads import InterruptibleIterator
from tests import warm
from tests.lerobot_writer import Dataset, write
from tests.nightly import by_day
from tests.program import REPO, TOY, environment, metrics, ranks_of, run, start, train_here

pytestmark = [pytest.mark.distributed, pytest.mark.timed]

RUN = [*TOY, "trainer.steps=12", "validation.every=0", "checkpoint.every=0", "logger=none"]
ENDLESS = [*RUN, "trainer.steps=1000000"]


def wait_for(holds, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not get there"
        time.sleep(0.02)


def rows(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


# Every rank answers an error of all of them, and those after rank 0 give it a head start of 20 s to be the one that is
# heard under torchrun. Here nobody ends them when rank 0 has ended: they would sit it out.
BY_HAND = (
    "from opentau_train import cli; from opentau_train.sinks import last_word; last_word.HEAD_START_S = 1.0; cli.main()"
)


def ranks_by_hand(commands: list[dict], size: int = 2, program: str = BY_HAND) -> list[subprocess.Popen]:
    """Processes without torchrun: {rank, arguments, and what else is to be different in the environment}."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for given in commands:
        rank, arguments = given["rank"], given["arguments"]
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": given.get("size", size), "LOCAL_WORLD_SIZE": size}
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **{k: str(v) for k, v in world.items()})
        env |= given.get("env", {})
        command = [sys.executable, "-c", program, *arguments]
        pipe = subprocess.PIPE
        cwd = given.get("cwd")  # `python -c` imports from there first
        # A rank of other code needs an interpreter of its own to import it.
        popen = subprocess.Popen if cwd else warm.Popen
        started.append(popen(command, env=env, cwd=cwd, text=True, stdout=pipe, stderr=subprocess.STDOUT))
    return started


def refused(commands: list[dict], size: int = 2) -> str:
    """Rank 0's output, when all ranks ended with 2."""
    processes = ranks_by_hand(commands, size)
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [2] * len(processes), "\n".join(outputs)
    assert "Traceback" not in outputs[0] and outputs[0].count("error:") == 1
    return outputs[0]


# -- preflight -------------------------------------------------------------------------------------------------------


def test_a_rank_with_another_configuration_is_named(tmp_path):
    arguments = [*RUN, f"paths.run_dir={tmp_path / 'run'}"]
    text = refused([{"rank": 0, "arguments": arguments}, {"rank": 1, "arguments": [*arguments, "trainer.steps=13"]}])
    assert "rank 1 differs from rank 0 in: the configuration's 'trainer'" in text
    assert not (tmp_path / "run").exists()


def test_a_rank_with_other_code_is_named(tmp_path):
    copy = tmp_path / "checkout"
    shutil.copytree(REPO / "opentau_train", copy / "opentau_train", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "opentau_train" / "rng.py").open("a") as file:
        file.write("\n# yesterday's\n")
    other = {"env": {"PYTHONPATH": f"{copy}:{REPO}"}, "cwd": copy}
    text = refused([{"rank": 0, "arguments": RUN}, {"rank": 1, "arguments": RUN, **other}])
    assert "rank 1 differs from rank 0 in: opentau_train's source code" in text


@pytest.mark.parametrize("name", by_day(["mine.py", "mine/inner.py"], "mine/inner.py"))
def test_a_rank_with_another_version_of_a_users_module_is_named(name, tmp_path):
    """Of the file that `_target_` names, or of any other of its package."""
    target = "mine.Policy" if name == "mine.py" else "mine.policy.Policy"
    for node, version in (("node0", 1), ("node1", 2)):
        (tmp_path / node / name).parent.mkdir(parents=True)
        (tmp_path / node / name).write_text(f"VERSION = {version}\n")
        policy = tmp_path / node / target.rpartition(".")[0].replace(".", "/")
        with policy.with_suffix(".py").open("a") as file:
            file.write("from opentau_train.models.flow import FlowPolicy\nclass Policy(FlowPolicy): ...\n")
    arguments = [*RUN, f"paths.run_dir={tmp_path / 'run'}", f"model._target_={target}"]
    ranks = [
        {"rank": rank, "arguments": arguments, "env": {"PYTHONPATH": f"{REPO}:{tmp_path / f'node{rank}'}"}}
        for rank in (0, 1)
    ]
    assert "rank 1 differs from rank 0 in: the code of 'mine'" in refused(ranks)
    assert not (tmp_path / "run").exists()


def test_a_rank_with_other_files_of_a_dataset_is_named_but_another_place_is_allowed(tmp_path):
    for name, lengths in (("here", [20, 30]), ("there", [20, 31])):
        write(tmp_path / name, Dataset(lengths=lengths))
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    base = [o for o in RUN if not o.startswith(("data.sources.", "trainer.steps"))] + ["trainer.steps=2"]

    def command(rank: int, root: str) -> dict:
        own = [f"data.sources.main.root={tmp_path / root}", f"paths.run_dir={tmp_path / 'run'}"]
        return {"rank": rank, "arguments": [*base, *own]}

    text = refused([command(0, "here"), command(1, "there")])
    assert "rank 1 differs from rank 0 in: dataset 'main'" in text

    shutil.copytree(tmp_path / "here", tmp_path / "changed")
    for file in (tmp_path / "changed/data").rglob("*.parquet"):  # as long, under the same metadata
        table = pq.read_table(file)
        values = np.array(table["action"].to_pylist(), np.float32)
        values[::7] += 0.25
        place = table.column_names.index("action")
        pq.write_table(table.set_column(place, "action", pa.array(values.tolist(), table["action"].type)), file)
    text = refused([command(0, "here"), command(1, "changed")])
    assert "rank 1 differs from rank 0 in: rows of dataset 'main'" in text

    processes = ranks_by_hand([command(0, "here"), command(1, "copy")])
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs


def test_a_rank_started_twice_is_named_with_both_places():
    text = refused([{"rank": r, "arguments": RUN} for r in (0, 1, 1)], size=3)
    assert "rank 1 was started 2 times" in text and text.count("process ") >= 2


def test_a_rank_of_another_world_size_is_named():
    text = refused([{"rank": 0, "arguments": RUN}, {"rank": 1, "arguments": RUN, "size": 4}])
    assert "rank 1 was started for a world of 4 ranks, rank 0 for 2" in text


def test_ranks_that_never_come_are_named():
    arguments = [*RUN, "trainer.step_timeout=10"]
    text = refused([{"rank": r, "arguments": arguments} for r in (0, 2)], size=4)
    assert "2 of 4 ranks did not arrive in 10 s: 1, 3" in text


# -- a rank that dies, stands still or goes mad ----------------------------------------------------------------------


@pytest.mark.parametrize("killed", by_day([2, 0], 0))
def test_a_killed_rank_ends_the_others_within_a_minute_and_is_named(killed, tmp_path):
    process = start([*ENDLESS, "trainer.global_batch_size=6", f"paths.run_dir={tmp_path}"], ranks=3)
    wait_for(lambda: rows(tmp_path) >= 3, process)
    ranks = ranks_of(process)
    os.kill(ranks[killed], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert f"error: rank {killed} is gone" in output and f"process {ranks[killed]}" in output, output
    assert re.search(rf"rank\s*: {killed} .*\n.*exitcode\s*: -9", output), output
    for pid in ranks.values():
        assert not Path(f"/proc/{pid}").exists()


def test_an_error_on_one_rank_is_what_the_others_tell(tmp_path):
    broken = [*ENDLESS, "model._target_=tests.misbehaving.Broken", f"paths.run_dir={tmp_path}"]
    processes = ranks_by_hand([{"rank": r, "arguments": broken} for r in (0, 1)])
    outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [EXIT_FAULT] * 2
    assert "Traceback" in outputs[1] and "ZeroDivisionError: division by a broken part" in outputs[1]
    assert "error: rank 1 failed: ZeroDivisionError: division by a broken part" in outputs[0], outputs[0]


def _has_ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def processes_of(run_dir: Path) -> set[str]:
    """The numbers of the processes that have a file of `run_dir` open, as all of a run's do: loader workers inherit
    rank 0's."""
    handles = (handle for handle in Path("/proc").glob("[0-9]*/fd/*"))
    found = set()
    for handle in handles:
        with suppress(OSError):
            if os.readlink(handle).startswith(f"{run_dir}/"):
                found.add(handle.parts[2])
    return found


def test_a_standstill_shows_every_ranks_stack_and_place_and_ends_the_job(tmp_path):
    """And leaves no process of it, loader workers neither, though the watchdog ends its rank without ado."""
    stuck = ["model._target_=tests.misbehaving.Stuck", "trainer.step_timeout=8", f"paths.run_dir={tmp_path}"]
    process = start([*ENDLESS, *stuck, "data.num_workers=2"], ranks=2)
    wait_for(lambda: len(processes_of(tmp_path)) >= 3, process)  # rank 0 and its workers
    output = process.communicate(timeout=200)[0]
    end = time.monotonic() + 10  # what is killed takes a moment to go
    while (left := processes_of(tmp_path)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    assert process.returncode == EXIT_FAULT
    assert "error: the run stands still; where each rank was:" in output
    assert "rank 1: no progress for 8 s in: forward and backward, step 3" in output
    assert re.search(r"rank 0: no progress for 8 s in: [a-z ]+, step 3", output), output
    for rank in (0, 1):
        text = (tmp_path / "stacks" / f"rank{rank}.txt").read_text()
        assert "loop.py" in text and "Current thread" in text
    assert "misbehaving.py" in (tmp_path / "stacks" / "rank1.txt").read_text()


def test_a_stopped_process_is_reported_as_silent(tmp_path):
    process = start([*ENDLESS, "trainer.step_timeout=6", f"paths.run_dir={tmp_path}"], ranks=2)
    wait_for(lambda: rows(tmp_path) >= 3, process)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGSTOP)
    wait_for(lambda: _has_ended(ranks[0]), process)
    os.kill(ranks[1], signal.SIGKILL)  # torchrun would do it after 30 s: a stopped process can't obey its SIGTERM
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "rank 1: no report" in output and "rank 0: no progress for 6 s in:" in output


@pytest.mark.parametrize("parallelism", by_day(["ddp", "fsdp"], "fsdp"))
def test_a_gradient_that_is_no_number_on_one_rank_skips_the_step_on_all(parallelism, tmp_path):
    degree = 2 if parallelism == "fsdp" else 1
    poisoned = ["model._target_=tests.misbehaving.Poisoned", f"parallelism.data_parallel_shard_degree={degree}"]
    every = ["trainer.steps=4", "checkpoint.every=1", "checkpoint.keep_last=null", "trainer.ema_decay=0.9"]
    done = run([*RUN, *poisoned, *every, f"paths.run_dir={tmp_path}"], ranks=2)
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path)
    assert [found[s]["Training/SkippedSteps"] for s in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert len({row["Training/BatchId"] for row in found.values()}) == 4
    before, skipped, after = (_state(tmp_path, step) for step in (2, 3, 4))
    assert before.keys() == skipped.keys() and any("exp_avg" in k for k in before)
    for name, value in before.items():
        assert torch.equal(value, skipped[name]), name
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def _state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their names: parameters, moments, average."""
    folder = run_dir / "checkpoints" / f"{step:08d}"
    whole = folder / "whole.pt"
    dcp_to_torch_save(folder / "state", whole)
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, tree) -> None:
        if isinstance(tree, torch.Tensor):
            flat[prefix] = tree
        elif isinstance(tree, dict):
            for key, value in tree.items():
                walk(f"{prefix}.{key}", value)

    walk("", torch.load(whole, weights_only=False))
    return flat | load_file(folder / "pretrained_model" / "model.safetensors")


# -- an end that hangs -----------------------------------------------------------------------------------------------

STALLED_STORAGE = """
import os
from opentau_train import cli
from opentau_train.checkpoints import commit

def stalled_seal(partial, described):
    open(os.environ["FIFO"]).read()

commit.seal = stalled_seal
cli.main()
"""

STALLED_CLOSE = """
import os, time
from torch.distributed.checkpoint.staging import DefaultStager
from opentau_train import cli

def stalled_close(stager):
    while True:
        time.sleep(0.1)

if os.environ["RANK"] == "1":
    DefaultStager.close = stalled_close
cli.main()
"""

LIMITED_GROUP = """
import time
from opentau_train.distributed import world as module

module.COLLECTIVE_MARGIN = 1.0
with module.launch(device="cpu", precision="no", timeout=3.0, identity={}) as world:
    group = world.background_group()
    world.gather(0, group)
    try:
        if world.is_main:
            world.gather(0, group)
        else:
            time.sleep(60)
    except RuntimeError as error:
        print("given up:", error, flush=True)
    import os
    os._exit(0)
"""


def test_a_background_save_that_hangs_after_an_error_ends_with_its_stack_and_the_error(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # nobody ever writes to it
    arguments = [*ENDLESS, "model._target_=tests.misbehaving.Broken", "trainer.step_timeout=8", "checkpoint.async=true"]
    arguments += ["checkpoint.every=2", f"paths.run_dir={tmp_path / 'run'}"]
    env = environment(RANK="1", FIFO=str(tmp_path / "fifo"))
    command = [sys.executable, "-c", STALLED_STORAGE, *arguments]
    done = warm.run(command, env=env, timeout=200)
    assert done.returncode == EXIT_FAULT
    assert "error: the run stands still" in done.stderr
    place = "closing after ZeroDivisionError: division by a broken part, step 3"
    assert f"rank 0: no progress for 8 s in: {place}" in done.stderr, done.stderr
    assert "stalled_seal" in (tmp_path / "run" / "stacks" / "rank0.txt").read_text()


def test_an_end_that_hangs_on_one_rank_ends_all_with_their_stacks(tmp_path):
    arguments = [*RUN, "trainer.steps=2", "checkpoint.async=true", "trainer.step_timeout=8"]
    arguments += [f"paths.run_dir={tmp_path}"]
    processes = ranks_by_hand([{"rank": r, "arguments": arguments} for r in (0, 1)], program=STALLED_CLOSE)
    outputs = [p.communicate(timeout=200)[0] for p in processes]
    assert [p.returncode for p in processes] == [EXIT_FAULT] * 2, outputs
    for rank in (0, 1):
        assert f"rank {rank}: no progress for 8 s in: closing, step 2" in outputs[0], outputs[0]
    assert "barrier" in (tmp_path / "stacks" / "rank0.txt").read_text()
    assert "stalled_close" in (tmp_path / "stacks" / "rank1.txt").read_text()
    assert (tmp_path / "checkpoints" / "00000002").is_dir()


def test_the_group_of_the_background_waits_no_longer_than_the_others(tmp_path):
    processes = ranks_by_hand([{"rank": r, "arguments": []} for r in (0, 1)], program=LIMITED_GROUP)
    try:
        output = processes[0].communicate(timeout=50)[0]  # torch's own limit is half an hour
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert "given up:" in output, output


# -- preemption ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return metrics(train_here([*RUN, *VALIDATING], tmp_path_factory.mktemp("whole") / "run"))


VALIDATING = ["validation.every=5", "validation.batch_size=3"]


def test_the_file_stops_all_ranks_and_is_cleared_by_the_next_start(tmp_path):
    whole = run([*RUN, f"paths.run_dir={tmp_path / 'whole'}"], ranks=2)
    assert whole.returncode == 0, whole.stderr
    slow = [*RUN, "model._target_=tests.misbehaving.Slow", f"paths.run_dir={tmp_path / 'run'}"]
    process = start([*slow, "trainer.steps=12"], ranks=2)
    wait_for(lambda: rows(tmp_path / "run") >= 1, process)
    (tmp_path / "run" / SENTINEL).touch()
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and "preempted at step" in output and f"exitcode  : {EXIT_PREEMPTED}" in output
    assert (tmp_path / "run" / MARKER).exists()
    again = run([*slow, "resume=auto"], ranks=2)
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "run" / SENTINEL).exists() and not (tmp_path / "run" / MARKER).exists()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("workers", by_day([0, 2], 2))
def test_a_stop_inside_a_validation_leaves_it_and_the_resumed_run_makes_it_up(workers, uninterrupted, tmp_path):
    """The signal comes when the step's row is written, which is when the pass begins."""
    command = [*RUN, *VALIDATING, f"data.num_workers={workers}", f"paths.run_dir={tmp_path}"]
    command.append("model._target_=tests.misbehaving.SlowValidation")
    process = start(command, SLOW_VALIDATION="1")
    wait_for(lambda: rows(tmp_path) >= 5, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_PREEMPTED and "preempted at step 5" in output, output
    assert not any(k.startswith("Validation") for k in metrics(tmp_path)[5])
    done = run([*command, "resume=auto"])
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path) == uninterrupted


@pytest.mark.parametrize("parallelism", by_day(["ddp", "fsdp"], "fsdp"))
def test_a_stop_on_one_rank_inside_a_validation_stops_all(parallelism, tmp_path):
    command = [*RUN, *VALIDATING, f"parallelism.data_parallel_shard_degree={2 if parallelism == 'fsdp' else 1}"]
    command += ["model._target_=tests.misbehaving.SlowValidation", f"paths.run_dir={tmp_path}"]
    process = start(command, ranks=2, SLOW_VALIDATION="1")
    wait_for(lambda: rows(tmp_path) >= 5, process)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGUSR1)
    output = process.communicate(timeout=100)[0]
    assert "preempted at step 5" in output, output


@pytest.mark.parametrize("workers", by_day([0, 1], 1))
def test_a_stop_while_one_ranks_data_hangs_is_obeyed_by_all(workers, tmp_path):
    hanging = [o for o in RUN if "sources.old" not in o] + [
        "data.sources.main._target_=tests.misbehaving.HangingSource"
    ]
    hanging += [f"data.num_workers={workers}", f"paths.run_dir={tmp_path}"]
    process = start(hanging, ranks=2)
    wait_for(lambda: rows(tmp_path) >= 3, process)
    (tmp_path / SENTINEL).touch()
    output = process.communicate(timeout=60)[0]
    assert "preempted at step 3" in output and (tmp_path / "checkpoints" / "00000003").is_dir(), output


@pytest.mark.parametrize("at_once", [True, False])
def test_a_stop_while_waiting_for_data_right_after_a_save_writes_no_step_again(at_once, tmp_path):
    """One that was written in the background is committed then: there is no step boundary any more."""
    hanging = [o for o in RUN if "sources.old" not in o] + ["checkpoint.every=3", "checkpoint.keep_last=1"]
    hanging += [f"checkpoint.async={not at_once}"]
    hanging += ["trainer.global_batch_size=2"]  # six reads are three steps
    hanging += ["data.sources.main._target_=tests.misbehaving.HangingSource", f"paths.run_dir={tmp_path}"]
    process = start(hanging, RANK="1")
    checkpoint = tmp_path / "checkpoints" / "00000003"
    written = checkpoint if at_once else checkpoint.with_suffix(PARTIAL)
    wait_for((written / MANIFEST).is_file, process)
    before = {path.relative_to(written): path.stat().st_mtime_ns for path in written.rglob("*")}
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_PREEMPTED and "preempted at step 3" in output, output
    assert output.count("saved ") == 1
    after = {path.relative_to(checkpoint): path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    # Its counters, and the list of files with what they hold, may be brought up to date when it is committed.
    changed = {str(path) for path in before if before[path] != after[path]}
    assert before.keys() == after.keys() and changed <= (set() if at_once else {RUN_FILE, MANIFEST})


def test_an_iterator_that_hangs_is_given_up_only_when_a_stop_is_asked_for(tmp_path):
    def items():
        yield 1
        while True:
            time.sleep(0.05)

    iterator, flag = InterruptibleIterator(items()), StopFlag()
    assert iterator.next(flag.poll) == 1
    flag.sentinel = tmp_path / SENTINEL
    flag.sentinel.touch()
    assert iterator.next(flag.poll) is None
    iterator.close()


def test_an_iterators_error_and_its_end_come_through():
    def items():
        yield 1
        raise KeyError("broken")

    iterator = InterruptibleIterator(items())
    assert iterator.next(StopFlag().poll) == 1
    with pytest.raises(KeyError, match="broken"):
        iterator.next(StopFlag().poll)
    with pytest.raises(StopIteration):
        iterator.next(StopFlag().poll)
    iterator.close()
