from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import textwrap

from opentau_train.sinks.console import ConsoleSink, read_scores

TRAINING = {
    "Training/Loss": 0.43211,
    "Training/GradNorm": 1.9234,
    "Training/LearningRate": 3e-4,
    "Training/SamplesPerSecond": 312.4,
}
PASS = {
    "Validation/droid/joint/MSE": 0.25,
    "Validation/droid/joint/MSE/N": 40.0,
    "Validation/droid/joint/MSE/StdErr": 0.01,
    "Validation/lab/arm/ee/CE": 2.0,
    "Validation/lab/arm/ee/CE/N": 8.0,
    "Validation/MSE": 0.25,
    "Validation/Loss": 0.45,
}


def test_plain_line_tells_step_numbers_and_eta(make_context, capsys):
    sink = ConsoleSink(context=make_context(start_step=10))
    sink.write(20, TRAINING)
    sink.write(30, {**TRAINING, "Training/SkippedSteps": 2.0})
    sink.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 20/100  loss 0.4321  grad 1.92  lr 3.00e-04  samples/s 312  eta 0:00:00")
    assert "skipped 2" in second and "skipped" not in first


def test_validation_table_is_aligned_and_shows_the_change(make_context, capsys):
    sink = ConsoleSink(context=make_context())
    sink.write(10, PASS)
    first = capsys.readouterr().err.splitlines()
    sink.write(20, {**PASS, "Validation/droid/joint/MSE": 0.2})
    second = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in first] == ["validation", "group", "droid/joint", "lab/arm/ee", "mixture"]
    assert first[2].split() == ["droid/joint", "40", "0.25000", "±", "0.01000"]
    assert second[2].split() == ["droid/joint", "40", "0.20000", "±", "0.01000", "-0.05000"]
    assert second[3].split() == ["lab/arm/ee", "8", "2.00000", "+0.00000"]
    header, droid, lab = second[1], second[2], second[3]
    assert droid.index("0.01000") + 7 == header.index("MSE") + 3  # right-aligned under its title
    assert lab.index("2.00000") + 7 == header.index("CE") + 2


def test_scores_keep_dataset_names_with_slashes():
    assert [(s.group, s.term, s.num) for s in read_scores({**TRAINING, **PASS})] == [
        ("droid/joint", "MSE", 40.0),
        ("lab/arm/ee", "CE", 8.0),
        ("", "MSE", None),
        ("", "Loss", None),
    ]


def shown_on_a_terminal(columns: int) -> str:
    """What a resumed run's sink writes to a terminal of that width."""
    code = """
        from pathlib import Path
        from opentau_train.sinks.base import SinkContext
        from opentau_train.sinks.console import ConsoleSink
        sink = ConsoleSink(context=SinkContext(Path("."), "droid", 100, 40, {}))
        sink.write(50, {"Training/Loss": 0.5})
        sink.write(50, {"Validation/MSE": 0.25})
        sink.close()
    """
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
    assert "40/100" in text and "50/100" in text and "loss=0.5000" in text and "validation at step 50" in text


def test_terminal_without_a_width_gets_lines():
    assert shown_on_a_terminal(0).startswith("step 50/100  loss 0.5000")
