"""Building a sharded policy, and an optimizer over its shards."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import environment

pytestmark = pytest.mark.distributed


def test_a_sharded_policy_is_built_in_its_shards_with_the_numbers_of_one_process(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    script = Path(__file__).parent / "build_cases.py"
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and done.stdout.count("all held") == 4, done.stdout + done.stderr[-4000:]
