"""Each stack of transforms gives the policy the numbers that it gave before."""

import json
from pathlib import Path

import pytest

from tests.golden import losses
from tests.program import metrics, train_here

GOLDEN = json.loads((Path(__file__).parent / "losses.json").read_text())


SLOW = ("openpi", "lerobot", "dropout", "policy", "wam", "forward_dynamics", "inverse_dynamics")
PARAMETERS = [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in losses.STACKS]


@pytest.mark.parametrize("stack", PARAMETERS)
def test_a_stack_of_transforms_gives_its_golden_losses(stack, tmp_path):
    rows = metrics(train_here([*losses.RUN, *losses.STACKS[stack]], tmp_path / "run"))
    given = [rows[2]["Training/Loss"], rows[4]["Training/Loss"], rows[4]["Validation/Loss"]]
    assert given == pytest.approx(
        GOLDEN[stack], rel=2e-3
    )  # another processor, another OpenCV: a large learning rate tells all apart


def test_no_two_stacks_have_the_same_losses():
    last = [round(values[2], 2) for values in GOLDEN.values()]
    assert len(set(last)) == len(last) == len(losses.STACKS)
