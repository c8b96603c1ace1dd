from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

from opentau_train.log import log_to
from opentau_train.sinks.console import ConsoleSink

TRAINING = {
    "Training/Loss": 0.43211,
    "Training/GradNorm": 1.9234,
    "Training/LearningRate": 3e-4,
    "Training/SamplesPerSecond": 312.4,
}
PASS = {"Validation/droid/joint/MSE": 0.25, "Validation/droid/joint/MSE/N": 40.0, "Validation/Loss": 0.25}


def test_plain_line_tells_step_numbers_and_eta(make_context, capsys):
    with log_to(sys.stderr, is_main=True):
        sink = ConsoleSink(context=make_context(start_step=10))
        sink.write(20, TRAINING)
        sink.write(100, {**TRAINING, "Training/Loss": 123.4567, "Training/SkippedSteps": 2.0})
        sink.close()
    first, second = capsys.readouterr().err.splitlines()
    assert " ".join(first.split()).startswith("step 20/100 loss 0.4321 grad 1.92 lr 3.00e-04 samples/s 312 eta")
    assert "skipped 2" in second and "skipped" not in first
    for label in ("loss", "grad", "lr", "samples/s", "eta"):
        assert first.index(label) == second.index(label), "the columns are not aligned"


def test_wait_is_told_as_a_share_of_a_step_beside_the_epoch(make_context, capsys):
    with log_to(sys.stderr, is_main=True):
        row = {**TRAINING, "Timing/Step": 0.4, "Timing/DataWait": 0.1, "Training/Epoch": 1.5}
        ConsoleSink(context=make_context()).write(20, row)
    assert "epoch   1.50  wait  25%" in capsys.readouterr().err


def test_first_step_is_told_at_once_and_later_ones_only_by_their_rows(make_context, capsys):
    with log_to(sys.stderr, is_main=True):
        sink = ConsoleSink(context=make_context(start_step=10))
        for step in (11, 12, 13):
            sink.advance(step)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 11/100 taken after ")


def test_log_file_holds_the_lines_and_the_tables(make_context, tmp_path, capsys):
    with log_to(sys.stderr, is_main=True) as console:
        console.also_to(tmp_path / "train.log")
        sink = ConsoleSink(context=make_context())
        sink.write(20, {**TRAINING, **PASS})
    printed = capsys.readouterr().err.splitlines()
    kept = (tmp_path / "train.log").read_text()
    assert any(line.startswith("droid/joint") for line in printed) and all(line in kept for line in printed)


def test_the_first_table_after_a_resume_shows_the_change_since_the_pass_before_it(make_context, tmp_path, capsys):
    """From the run's own rows, of which a kill has cut the last one off."""
    rows = [{"step": 10, "time": 0, **PASS}, {"step": 20, "time": 0, **TRAINING}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"Validation/Loss": 9')
    with log_to(sys.stderr, is_main=True):
        sink = ConsoleSink(context=make_context(start_step=20))
        sink.compare({"Validation/droid/joint/MSE": -0.05, "Validation/droid/joint/MSE/StdErr": 0.02})
        sink.write(30, {**PASS, "Validation/droid/joint/MSE": 0.2, "Validation/Loss": 0.21})
        sink.write(40, PASS)
    first, _, group, second, _, again = capsys.readouterr().err.splitlines()
    assert first == "validation at step 30: loss 0.2100, change -0.0400"
    assert group.split() == ["droid/joint", "40", "0.2000", "-0.050±0.020"]
    assert again.split()[-1] == "+0.0500" and second.endswith(", change +0.0400")


RESUMED = """
    import sys
    from pathlib import Path
    from opentau_train.log import log_to
    from opentau_train.sinks.base import SinkContext
    from opentau_train.sinks.console import ConsoleSink
    with log_to(sys.stderr, is_main=True):
        sink = ConsoleSink(context=SinkContext(Path("."), "droid", 100, 40, {}))
        sink.write(50, {"Training/Loss": 0.5})
        sink.write(50, {"Validation/MSE": 0.25})
        sink.close()
"""


def shown_on_a_terminal(columns: int, code: str = RESUMED) -> str:
    """What a program writes to a terminal of that width; by default a resumed run's sink."""
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stderr=terminal, check=True)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(main, 4096):
            shown += part
    except OSError:  # Linux's end of file on a terminal nobody holds any more
        pass
    os.close(main)
    return shown.decode()


def test_terminal_gets_a_bar_that_starts_where_the_run_resumes():
    text = shown_on_a_terminal(120)
    assert "40/100" in text and "50/100" in text and "loss 0.5000" in text and "validation at step 50" in text


def test_terminal_without_a_width_gets_lines():
    assert shown_on_a_terminal(0).startswith("step  50/100  loss   0.5000")


PANE = """
import logging, sys, time
from pathlib import Path
from opentau_train.log import log_to
from opentau_train.sinks.base import SinkContext
from opentau_train.sinks.console import ConsoleSink
row = {"Training/Loss": 0.5, "Training/Epoch": 1.25, "Timing/Step": 0.4, "Timing/DataWait": 0.1,
       "Training/GradNorm": 1.9, "Training/LearningRate": 3e-4, "Training/SamplesPerSecond": 312.0}
log = logging.getLogger("opentau_train.x")
config = {"validation": {"every": 100}, "checkpoint": {"every": 50}}
with log_to(sys.stderr, is_main=True):
    sink = ConsoleSink(context=SinkContext(Path("."), "droid_policy", 1000, 0, config))
    for step in range(1, 558):
        sink.stage("data wait", 0, 0)
        sink.advance(step)
        if step % 50 == 0:
            sink.write(step, row)
            sink.stage("save", 0, 0)
            if step == 550:
                time.sleep(1.2)  # its bar is drawn on a thread
            log.info("saved checkpoint %d", step)
        if step % 100 == 0:
            for done in range(27):
                sink.stage("validation", done, 27)
            sink.write(step, {"Validation/Loss": 0.5, "Validation/a/joint/MSE": 0.5})
    for done in range(13):
        sink.stage("validation", done, 27)
    log.warning("a warning within the validation")
    sink._bar.refresh()
    sink._stage.bar.refresh()
    time.sleep(60)
"""


def pane(columns: int, tmp_path: Path, until: str) -> list[str]:
    """The lines of a terminal on which `PANE` runs, once `until` is there."""
    code = tmp_path / "pane.py"
    code.write_text(PANE)
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null"]
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(code))}"
    size = ["-x", str(columns), "-y", "50"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    subprocess.run([*tmux, "new-session", "-d", *size, command], env=environment, cwd=root, check=True)
    try:
        for _ in range(600):
            shown = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout
            if until in shown:
                break
            time.sleep(0.1)
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)
    return [line.rstrip() for line in shown.splitlines() if line.strip()]


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux isn't installed")
@pytest.mark.parametrize("columns", [60, 80, 110, 200])
def test_pane_shows_whole_bars_of_steps_and_of_the_validation_below_whole_lines_of_the_log(columns, tmp_path):
    lines = pane(columns, tmp_path, "12/27")
    expected = []
    for step in range(50, 551, 50):
        expected.append(f"saved checkpoint {step}")
        if step % 100 == 0:
            expected += [f"validation at step {step}: loss 0.5000", "group", "a/joint"]
    expected.append("a warning within the validation")
    logged = [line if line.startswith(("saved", "a warning")) else line.split(", ")[0] for line in lines[:-2]]
    begins = [line.split()[0] for line in expected]
    assert [line.split()[0] for line in logged] == begins, "a line of the log is glued to a bar, or a bar left a trace"
    assert all(line in logged for line in expected if line.startswith(("saved", "a warning", "validation")))
    bar, below = lines[-2:]
    assert re.search(r"56%\|.+\| 557/1000 \[\d+:\d\d<\d+:\d\d\]", bar) and len(bar) <= columns
    every = ["loss 0.5000", "epoch 1.25", "wait 25%", "grad 1.9", "lr 3.00e-04", "samples/s 312"]
    num = {60: 1, 80: 3, 110: 4, 200: 6}[columns]
    assert [field for field in every if field in bar] == every[:num]
    assert ("droid_policy" in bar) == (columns >= 110)
    assert re.fullmatch(r"validation +44%\|.+\| 12/27 \[\d+:\d\d<(\d+:\d\d|\?)\]", below) and len(below) <= columns
