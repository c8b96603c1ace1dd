"""What docs/deploy.md and the README show runs as it stands, on a run of this test: their Python, and the commands of a
server and of the open-loop check."""

import importlib
import re
import shlex

import numpy as np
import pytest

from opentau_train import load_policy
from tests.program import REPO
from tests.served import serving

pytestmark = pytest.mark.filterwarnings("ignore:connect")  # as openpi-client calls it


class Robot(list):
    """Gives observations, and takes actions."""

    def __init__(self, observations):
        super().__init__(observations)
        self.sent = []

    def send(self, action):
        self.sent.append(action)


@pytest.fixture(scope="module")
def served(own_run):
    with serving(own_run) as one:
        yield one


@pytest.mark.parametrize("document", ["docs/deploy.md", "README.md"])
def test_the_examples_run_one_after_another(document, own_run, served, capsys):
    policy = load_policy(own_run)
    picture, q = np.zeros((48, 64, 3), np.uint8), np.zeros(4)
    observation = {"front": picture, "state": q, "task": "open the drawer"}
    known = {"img": picture, "q": q, "observation": observation, "robot": Robot([observation] * 3)}
    for block in re.findall(r"^```python\n(.*?)^```", (REPO / document).read_text(), flags=re.S | re.M):
        assert "runs/x/checkpoints/best" in block or "policy" in known
        block = block.replace('"runs/x/checkpoints/best"', repr(str(own_run))).replace("wrist", policy.cameras[0])
        block = block.replace("port=8000", f"port={served.port}")
        exec(block, known)
    shape = (policy.chunk_length, len(policy.action_names))
    if document == "README.md":
        assert known["actions"].shape == shape
    else:
        assert known["two"].shape == (2, *shape) and known["actions"].shape == (1, *shape)
        assert len(known["robot"].sent) == 6, "3 by the stream, 3 by the broker"
        assert {action.shape for action in known["robot"].sent} == {shape[1:]}
        np.testing.assert_array_equal(known["reply"]["actions"], policy.act(observation, seed=1))
        assert "prefix" in capsys.readouterr().out and "noise.actions" in known["inputs"]


def test_the_commands_of_a_server_and_of_the_check_run_one_after_another(
    own_run, served, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text, began, pages = (REPO / "docs" / "deploy.md").read_text(), False, []
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.S | re.M):
        for line in block.splitlines():
            _, _, module, *words = shlex.split(line)
            tool = module.rpartition(".")[2]
            if tool == "serve":  # is served here, at a port that is free
                began = words == ["checkpoint=RUN", "port=8000"]
            elif tool in ("record", "replay_dataset"):
                assert began or not any("8000" in word for word in words)
                real = {"RUN": str(own_run), "ROOT": str(own_run.parent / "set"), ":8000": f":{served.port}"}
                for name, value in real.items():
                    words = [word.replace(name, value) for word in words]
                assert importlib.import_module(module).main(words) == 0, capsys.readouterr().err
                pages.append((tmp_path / "open_loop.html").read_text() if tool == "replay_dataset" else None)
    table = re.compile(r"<table>.*</table>")
    first, second, none, last = pages
    assert none is None and table.search(first)[0] == table.search(second)[0] == table.search(last)[0]
