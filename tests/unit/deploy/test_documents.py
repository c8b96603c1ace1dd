"""What docs/deploy.md and the README show runs as it stands, on a run of this test: their Python, and the commands of a
server and of the open-loop check."""

import importlib
import json
import re
import shlex

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from opentau_train import load_policy
from opentau_train.deploy.latency import noise
from tests.program import REPO, train_here
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


@pytest.mark.slow
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


def commands(*sections):
    """(module, arguments) of each line of bash in sections of docs/deploy.md."""
    text = (REPO / "docs" / "deploy.md").read_text()
    for section in sections:
        part = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
        for block in re.findall(r"^```bash\n(.*?)^```", part, flags=re.S | re.M):
            for line in block.splitlines():
                _, _, module, *words = shlex.split(line)
                yield module, words


def test_the_commands_of_a_server_and_of_the_check_run_one_after_another(
    own_run, served, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    real = {"RUN": str(own_run), "ROOT": str(own_run.parent / "set"), ":8000": f":{served.port}"}
    pages = []
    for module, words in commands("Behind a server", "The open-loop check"):
        tool = module.rpartition(".")[2]
        if tool == "serve":  # what is served here, at a port that is free
            assert words == ["checkpoint=RUN", "port=8000"]
            continue
        for name, value in real.items():
            words = [word.replace(name, value) for word in words]
        assert importlib.import_module(module).main(words) == 0, capsys.readouterr().err
        pages.append((tmp_path / "open_loop.html").read_text() if tool == "replay_dataset" else None)
    table = re.compile(r"<table>.*</table>")
    first, second, none, last = pages
    assert none is None and table.search(first)[0] == table.search(second)[0] == table.search(last)[0]


@pytest.mark.slow
def test_the_way_from_demonstrations_to_a_success_rate_is_gone_as_it_stands(tmp_path, monkeypatch):
    """Two demonstrations, steps and episodes in place of so many; the server answers openpi's client."""
    monkeypatch.chdir(tmp_path)
    fewer = {"episodes=100": "episodes=2", "trainer.steps=2400": "trainer.steps=2", "port=8000": "port=0"}
    gone = []
    for module, words in commands("From demonstrations to a success rate"):
        words = [fewer.get(word, word) for word in words]
        gone.append(module.rpartition(".")[2])
        if module == "opentau_train":
            kept = [word for word in words if not word.startswith("paths.")]
            train_here([*kept, "trainer.global_batch_size=4", "data.num_workers=0"], tmp_path / "RUN")
        elif gone[-1] == "serve":
            policy = load_policy("RUN")
            with serving(tmp_path / "RUN") as served:
                client = WebsocketClientPolicy("127.0.0.1", served.port)
                assert client.get_server_metadata()["cameras"] == list(policy.cameras)
                observation = noise(policy, policy.robot())
                np.testing.assert_array_equal(client.infer(observation)["actions"], policy.act(observation))
        else:
            assert importlib.import_module(module).main(words) == 0
    assert gone == ["demos", "opentau_train", "replay_dataset", "rollout", "serve"]
    (outcome,) = (tmp_path / "RUN").rglob("rollout.json")
    assert len(json.loads(outcome.read_text())["episodes"]) == 2
