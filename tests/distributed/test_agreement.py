"""What one rank can't do ends all of them alike, and leaves none in a collective."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.program import REPO, environment

pytestmark = pytest.mark.distributed


def test_an_error_of_a_nodes_later_rank_is_raised_on_all(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.distributed.agreement_case"]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    told = "no room on this process's disk here (on rank 1)"
    assert sorted(said) == sorted(f"rank {r}: {kind} {told}" for r in (0, 1) for kind in ("UserError", "Fault"))
