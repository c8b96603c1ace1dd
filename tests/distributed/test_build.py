"""Building a sharded policy, and an optimizer over its shards."""

from pathlib import Path

import pytest

from tests.nightly import AT_NIGHT
from tests.program import torchrun

pytestmark = [pytest.mark.distributed, *AT_NIGHT]  # by day test_topology.py trains in shards as in one process


def test_a_sharded_policy_is_built_in_its_shards_with_the_numbers_of_one_process(tmp_path):
    done = torchrun(4, Path(__file__).parent / "build_cases.py", tmp_path)
    assert done.returncode == 0 and done.stdout.count("all held") == 4, done.stdout + done.stderr[-4000:]
