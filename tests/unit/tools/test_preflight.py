"""`tools.check` of a composed configuration: what a job needs, looked at on a machine that has no device."""

from __future__ import annotations

import json
import re
import time

import pytest
import yaml

from opentau_train.checkpoints import room
from opentau_train.composing import checked, compose
from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.tools import check
from opentau_train.tools.preflight import walltime as times
from opentau_train.tools.preflight.rendezvous import rendezvous
from tests.program import DATA, TINY_POLICY

TRAINING = ["+recipe=lerobot", f"data.sources.main.root={DATA / 'lerobot_v30'}", *TINY_POLICY]
NAMES = ["settings", "data", "data", "rows", "disk", "memory", "walltime", "rendezvous"]


@pytest.fixture
def lines(tmp_path, capsys, monkeypatch):
    """Calls the tool with --json; returns {name: its first line that isn't ok, or its first}."""
    for name in ("WORLD_SIZE", "NNODES", "MASTER_ADDR", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str, code: int = EXIT_OK) -> dict[str, dict]:
        given = [*TRAINING, f"paths.root={tmp_path / 'runs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
        assert check.main([*given, "--json", *words]) == code
        told = json.loads(capsys.readouterr().out)
        assert told["ok"] == (code == EXIT_OK)
        return {line["name"]: line for line in sorted(told["checks"], key=lambda line: line["status"] != "ok")}

    return call


def test_everything_is_looked_at_in_a_line_each(tmp_path, capsys):
    assert check.main([*TRAINING, f"paths.root={tmp_path / 'runs'}"]) == EXIT_OK
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[: len(NAMES)]]
    assert [row[0] for row in rows] == NAMES and {row[1] for row in rows} == {"ok"}
    assert not (tmp_path / "runs").exists(), "a look leaves nothing behind"


def test_a_mistake_leaves_the_rest_to_be_looked_at(lines, tmp_path):
    (tmp_path / "file").touch()
    told = lines(f"paths.run_dir={tmp_path / 'file' / 'run'}", code=EXIT_USER)
    assert told["disk"]["status"] == "error" and told["disk"]["remedy"].startswith("set paths.run_dir")
    assert told["memory"]["status"] == "ok"
    told = lines("data.sources.main.root=/nowhere", code=EXIT_USER)
    assert "doesn't exist" in told["data"]["text"] and told["rendezvous"]["status"] == "ok" and "disk" not in told
    told = lines("trainer.stps=3", code=EXIT_USER)
    assert told["settings"]["status"] == "error" and told.keys() == {"settings", "rendezvous"}


@pytest.mark.slow
def test_a_small_device_is_warned_of_and_what_takes_less_is_named(lines):
    told = lines("--device-memory", "0.001")["memory"]
    assert told["status"] == "warning" and "more than 90% of a device's" in told["text"] and told["remedy"]
    assert lines("--device-memory", "80")["memory"]["status"] == "ok"
    assert "no device here" in lines()["memory"]["text"]


def test_the_batch_must_be_shared_by_the_ranks(lines, monkeypatch):
    assert lines("--ranks", "3", code=EXIT_USER)["memory"]["status"] == "error"
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    assert "a rank of 8" in lines()["memory"]["text"]


def test_checkpoints_that_have_no_room_are_told(tmp_path):
    settings = checked(compose([*TRAINING, "trainer.steps=100", "checkpoint.every=10", "checkpoint.keep_last=2"]))
    needs = room.needed(tmp_path / "not" / "there" / "checkpoints", settings, 0, 10**17)
    assert needs.lacks and needs.num == 5 and needs.more == 5 * 10**17
    assert not room.needed(tmp_path / "checkpoints", settings, 0, 1).lacks


def test_a_warning_of_the_data_is_a_line(lines):
    """The two sources have other rates."""
    old = DATA / "lerobot_v21"
    told = lines(
        f"data.sources.old.root={old}", "data.sources.old.robot_type=toy6", "data.sources.old.val_split_ratio=0.3"
    )
    assert told["data"]["status"] == "warning" and "different rates" in told["data"]["text"]


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216000), ("1-01:30", 91800), ("1-01:30:10", 91810)],
)
def test_a_walltime_is_read_as_slurm_writes_it(text, seconds):
    assert times.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "1-x", "-5"])
def test_what_is_no_walltime_is_refused(text, lines, capsys):
    assert check.main([*TRAINING, f"--walltime={text}"]) == EXIT_USER
    assert f"'{text}' is no time" in capsys.readouterr().err


def test_steps_are_held_against_the_walltime(lines, monkeypatch):
    told = lines("--rate", "2", "--walltime", "20:00", "trainer.steps=2400")["walltime"]
    assert told["status"] == "ok" and "take 20 min, the job has 20 min" in told["text"]
    told = lines("--rate", "2", "--walltime", "19:00", "trainer.steps=2400")["walltime"]
    assert told["status"] == "warning" and "trainer.steps=2280" in told["remedy"] and "resume=auto" in told["remedy"]
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    assert lines("--rate", "1", "trainer.steps=600")["walltime"]["status"] == "warning"


def write_run(folder, tree, seconds):
    """A run of 50 steps that took so many seconds each, in rows of ten; the first took a minute more."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    rows = [{"step": s, "time": 1e9 + 60 + s * seconds, "Timing/Step": seconds} for s in (10, 20, 30, 40, 50)]
    rows[0]["Timing/Step"] += 6
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_the_rate_is_that_of_an_earlier_run_of_the_same_configuration(lines, tmp_path):
    words = [*TRAINING, f"paths.root={tmp_path / 'runs'}", f"paths.cache_dir={tmp_path / 'cache'}", "trainer.steps=50"]
    write_run(tmp_path / "runs" / "lerobot-a-1", compose(words), seconds=0.5)
    assert "at 2 a second" in lines("trainer.steps=1000")["walltime"]["text"]
    assert "no rate is known" in lines("trainer.global_batch_size=64")["walltime"]["text"]


@pytest.mark.parametrize("content", ["", "{", '{"step": 1, "time": 1.0}\n', "garbled\n"])
def test_a_run_that_tells_no_rate_is_passed_over(content, lines, tmp_path):
    words = [*TRAINING, f"paths.root={tmp_path / 'runs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    write_run(tmp_path / "runs" / "lerobot-a-1", compose(words), seconds=0.5)
    (tmp_path / "runs" / "lerobot-a-1" / "metrics.jsonl").write_text(content)
    assert "no rate is known" in lines()["walltime"]["text"]


# -- where the processes meet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "text", "ranks"),
    [
        ({}, "one process", 1),
        ({"NPROC_PER_NODE": "8"}, "8 processes", 8),
        (
            {"NNODES": "2", "NPROC_PER_NODE": "4", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"},
            "2 nodes of 4 processes, which meet at 127.0.0.1:29500",
            8,
        ),
        ({"SLURM_JOB_NUM_NODES": "4", "NPROC_PER_NODE": "8"}, "the first node of SLURM's job", 32),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}, "one process", 1),
    ],
)
def test_variables_that_fit_are_told(environ, text, ranks):
    (line,), topology = rendezvous(environ, None)
    assert line.status == "ok" and text in line.text and topology.ranks == ranks


@pytest.mark.parametrize(
    ("environ", "status", "text"),
    [
        ({"NNODES": "2"}, "error", "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "two"}, "error", "NNODES=two is no whole number"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "127.0.0.1"}, "error", "NODE_RANK=2 is outside of NNODES=2"),
        ({"MASTER_PORT": "70000"}, "error", "MASTER_PORT=70000"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "error", "WORLD_SIZE is set, but not MASTER_ADDR, MASTER_PORT"),
        ({"NNODES": "2", "MASTER_ADDR": "no.such.host.invalid"}, "warning", "no.such.host.invalid is not known here"),
    ],
)
def test_variables_that_don_t_fit_are_told(environ, status, text):
    lines, _ = rendezvous(environ, None)
    assert [line.status for line in lines] == [status]
    assert re.search(re.escape(text), lines[0].text) and lines[0].remedy
