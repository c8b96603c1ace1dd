"""What ranks agree on before a step."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import environment

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("case", "survivors"), [("agree", 4), ("lose", 3)])
def test_all_ranks_agree_and_hear_of_a_lost_one_that_they_have_no_connection_to(case, survivors):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    script = Path(__file__).parent / "consensus_case.py"
    done = subprocess.run([*torchrun, script, case], env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stdout.count("held") == survivors, done.stderr[-4000:]
