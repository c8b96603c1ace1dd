"""What one rank can't do ends all of them alike, and leaves none in a collective."""

from __future__ import annotations

import pytest

from tests.lerobot_writer import DEFAULT_COLUMNS, Dataset, write
from tests.program import torchrun

pytestmark = pytest.mark.distributed


def test_an_error_of_a_nodes_later_rank_is_raised_on_all(tmp_path):
    done = torchrun(2, "-m", "tests.distributed.agreement_case")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    told = "no room on this process's disk here (on rank 1)"
    assert sorted(said) == sorted(f"rank {r}: {kind} {told}" for r in (0, 1) for kind in ("UserError", "Fault"))


def test_ranks_compute_statistics_together_and_tell_of_a_broken_file_and_of_a_killed_one(tmp_path):
    written = Dataset(cameras={}, columns=DEFAULT_COLUMNS, lengths=[23, 5, 41, 17, 8, 30, 12, 9, 33, 20])
    root = write(tmp_path / "set", written)
    done = torchrun(2, "-m", "tests.distributed.statistics_case", str(root))
    said = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    broken = f"rows can't be read, episode 6, {sorted((root / 'data').rglob('*.parquet'))[3]} (on rank 1)"
    alike = [f"rank {r}: {words}" for r in (0, 1) for words in ("the same: True", broken)]
    assert sorted(said) == sorted([*alike, "rank 0: rank 1 is gone"]), done.stdout + done.stderr
