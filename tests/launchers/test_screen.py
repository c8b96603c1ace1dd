"""`launchers/screen.py` leaves a user's mistake as the last thing on a screen, and every other line as it came."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCREEN = [sys.executable, "-I", str(Path(__file__).parents[2] / "launchers" / "screen.py")]
LOG = (
    "E1127 03:22:46.708000 2259 /venv/lib/torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 2)\n"
)
AGENT = (
    LOG
    + """Traceback (most recent call last):
  File "/venv/bin/torchrun", line 8, in <module>
    sys.exit(main())
             ^^^^^^
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\x20
============================================================
opentau_train FAILED
------------------------------------------------------------
Failures:
[1]:
  exitcode  : -15 (pid: 2331)  (SIGTERM)
  traceback : Signal 15 (SIGTERM) received by PID 2331
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  exitcode  : 2 (pid: 2330)\x20
  traceback : {cause}
============================================================
"""
)
MISTAKE = "\n  error: dataset directory /nowhere doesn't exist\n    where:  data.sources.main\n    remedy: set it"
OF_A_RANK = """Traceback (most recent call last):
  File "train.py", line 8, in <module>

ZeroDivisionError: division by zero
error: division by zero
"""


def screen(text: str) -> str:
    return subprocess.run(SCREEN, input=text, capture_output=True, text=True, check=True, timeout=60).stdout


def test_of_a_mistake_only_its_message_is_left():
    shown = screen("step 1\nWarnings come\n" + AGENT.format(cause=MISTAKE))
    told = "error: dataset directory /nowhere doesn't exist\n  where:  data.sources.main\n  remedy: set it\n"
    assert shown == "step 1\nWarnings come\n" + told


@pytest.mark.parametrize(
    "text",
    [
        AGENT.format(cause="Signal 9 (SIGKILL) received by PID 7"),
        OF_A_RANK + AGENT.format(cause="To enable traceback see: https://pytorch.org"),
        AGENT.format(cause=MISTAKE)[:-70],  # torchrun was killed within it
        LOG + "a rank's line\n" + LOG,
        OF_A_RANK.replace("Zero", "torch.distributed.elastic.multiprocessing.errors.Other"),
        "no newline at the end",
        "",
    ],
)
def test_every_other_line_stays_as_it_came(text):
    assert screen(text) == text


def test_lines_and_parts_of_lines_are_passed_on_while_more_is_to_come():
    with subprocess.Popen(SCREEN, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for part in (b"step 1\n", b"password? ", LOG.encode()):
            process.stdin.write(part)
            process.stdin.flush()
            if part != LOG.encode():
                assert os.read(process.stdout.fileno(), 100) == part
        time.sleep(0.3)
        os.set_blocking(process.stdout.fileno(), False)
        assert process.stdout.read() is None, "it isn't known yet whose last words this begins"
        process.stdin.close()
        process.wait()
        assert process.stdout.read() == LOG.encode()
