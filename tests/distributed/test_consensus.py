"""What ranks agree on before a step."""

from pathlib import Path

import pytest

from tests.program import torchrun

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("case", "survivors"), [("agree", 4), ("lose", 3)])
def test_all_ranks_agree_and_hear_of_a_lost_one_that_they_have_no_connection_to(case, survivors):
    done = torchrun(4, Path(__file__).parent / "consensus_case.py", case)
    assert done.returncode == 0 and done.stdout.count("held") == survivors, done.stderr[-4000:]
