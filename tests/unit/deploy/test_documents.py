"""The Python that docs/deploy.md and the README show runs as it stands, on a run of this test."""

import re

import numpy as np
import pytest

from opentau_train import load_policy
from tests.program import REPO


class Robot(list):
    """Gives observations, and takes actions."""

    def __init__(self, observations):
        super().__init__(observations)
        self.sent = []

    def send(self, action):
        self.sent.append(action)


@pytest.mark.parametrize("document", ["docs/deploy.md", "README.md"])
def test_the_examples_run_one_after_another(document, own_run, capsys):
    policy = load_policy(own_run)
    picture, q = np.zeros((48, 64, 3), np.uint8), np.zeros(4)
    observation = {"front": picture, "state": q, "task": "open the drawer"}
    known = {"img": picture, "q": q, "observation": observation, "robot": Robot([observation] * 3)}
    for block in re.findall(r"^```python\n(.*?)^```", (REPO / document).read_text(), flags=re.S | re.M):
        assert "runs/x/checkpoints/best" in block or "policy" in known
        block = block.replace('"runs/x/checkpoints/best"', repr(str(own_run))).replace("wrist", policy.cameras[0])
        exec(block, known)
    shape = (policy.chunk_length, len(policy.action_names))
    if document == "README.md":
        assert known["actions"].shape == shape
    else:
        assert known["two"].shape == (2, *shape) and known["actions"].shape == (1, *shape)
        assert len(known["robot"].sent) == 3 and known["robot"].sent[0].shape == shape[1:]
        assert "prefix" in capsys.readouterr().out and "noise.actions" in known["inputs"]
