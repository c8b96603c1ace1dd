"""What one rank can't do ends all of them alike, and leaves none in a collective."""

from __future__ import annotations

import pytest

from tests.program import torchrun

pytestmark = pytest.mark.distributed


def test_an_error_of_a_nodes_later_rank_is_raised_on_all(tmp_path):
    done = torchrun(2, "-m", "tests.distributed.agreement_case")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    told = "no room on this process's disk here (on rank 1)"
    assert sorted(said) == sorted(f"rank {r}: {kind} {told}" for r in (0, 1) for kind in ("UserError", "Fault"))
