from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opentau_train.errors import UserError
from opentau_train.sinks.jsonl import JsonlSink


def rows(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def write(context, steps, value=1.0):
    sink = JsonlSink(context=context)
    for step in steps:
        sink.write(step, {"Training/Loss": value})
    sink.close()


def test_row_is_on_disk_before_the_sink_is_closed(make_context, tmp_path):
    sink = JsonlSink(context=make_context())
    sink.write(1, {"Training/Loss": 0.5, "Training/SkippedSteps": 0})
    (row,) = rows(tmp_path / "metrics.jsonl")
    sink.close()
    assert (row["step"], row["Training/Loss"], row["Training/SkippedSteps"]) == (1, 0.5, 0.0) and row["time"] > 1.6e9


def test_non_finite_numbers_are_null(make_context, tmp_path):
    write(make_context(), [1], float("nan"))
    write(make_context(1), [2], float("-inf"))
    assert [r["Training/Loss"] for r in rows(tmp_path / "metrics.jsonl")] == [None, None]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=5))
def test_every_step_stands_once_after_any_chain_of_kills_and_resumes(make_context, tmp_path_factory, attempts):
    """Each attempt starts at a checkpoint not after what was reached, and the rows it repeats are kept aside."""
    run_dir = tmp_path_factory.mktemp("run")
    reached, written = 0, 0
    for number, (length, back) in enumerate(attempts):
        start = max(reached - back, 0)
        write(make_context(start, run_dir=run_dir), range(start + 1, start + length + 1), float(number))
        reached, written = start + length, written + length
        found = rows(run_dir / "metrics.jsonl")
        assert [r["step"] for r in found] == list(range(1, reached + 1))
        assert {r["Training/Loss"] for r in found if r["step"] > start} == {float(number)}
        aside = run_dir / "metrics.superseded.jsonl"
        assert len(found) + (len(rows(aside)) if aside.exists() else 0) == written


def test_resume_after_sigkill_drops_only_the_torn_line(make_context, tmp_path):
    code = """
import os, sys, pathlib, signal
from opentau_train.sinks.base import SinkContext
from opentau_train.sinks.jsonl import JsonlSink
sink = JsonlSink(context=SinkContext(pathlib.Path(sys.argv[1]), "x", 9, 0, {}))
for step in (1, 2, 3):
    sink.write(step, {"Training/Loss": 1.0})
sink._file.write('{"step": 4, "Trai')
sink._file.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    write(make_context(2), [3, 4])
    assert [r["step"] for r in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [r["step"] for r in rows(tmp_path / "metrics.superseded.jsonl")] == [3]


def test_kill_between_the_two_files_repeats_no_superseded_row(make_context, tmp_path):
    write(make_context(), [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_text()
    JsonlSink(context=make_context(1)).close()
    (tmp_path / "metrics.jsonl").write_text(before)  # as if killed before the second file was replaced
    JsonlSink(context=make_context(1)).close()
    assert [r["step"] for r in rows(tmp_path / "metrics.superseded.jsonl")] == [2, 3]


def test_foreign_line_names_its_place(make_context, tmp_path):
    write(make_context(), [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("hello\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        JsonlSink(context=make_context(1))
