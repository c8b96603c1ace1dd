"""The same policy plays the same episodes on 1, 2 and 4 processes, replicated or sharded, each exactly once."""

import json

import pytest

from opentau_train.errors import EXIT_USER
from opentau_train.simulation.demonstrations import Wanted, write
from tests.nightly import by_day
from tests.program import TINY_POLICY, metrics, torchrun, train_here
from tests.simulators import line

pytestmark = pytest.mark.distributed

TOPOLOGIES = {"2": (2, []), "4": (4, []), "fsdp_2": (2, ["parallelism.data_parallel_shard_degree=2"])}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    write(folder / "set", line(), Wanted(6), 2, 60.0)
    environment = json.dumps(line()).replace('"', "")
    own = [f"validation.evaluator.rollout.environments.line={environment}", "validation.evaluators=[rollout]"]
    own += ["validation.evaluator.rollout.episodes=9", "validation.evaluator.rollout.simulators=2"]
    own += ["trainer.steps=2", "trainer.ema_decay=0.5", "validation.every=2", "trainer.global_batch_size=4"]
    data = ["+recipe=lerobot", f"data.sources.main.root={folder / 'set'}", "data.num_workers=0"]
    return train_here([*data, *own, *TINY_POLICY], folder / "run")


@pytest.mark.parametrize("topology", by_day(TOPOLOGIES, "fsdp_2"))
def test_one_checkpoint_has_one_success_rate(topology, run, tmp_path):
    """Nine episodes in blocks of two: the fourth of four ranks has one block, the first two; films come from both."""
    ranks, more = TOPOLOGIES[topology]
    out = tmp_path / "v.json"
    done = torchrun(ranks, "-m", "opentau_train.validate", f"checkpoint={run}", f"out={out}", "trust=[tests]", *more)
    assert done.returncode == 0, done.stderr
    logged = {k: v for k, v in metrics(run)[2].items() if k.startswith("Rollout")}
    assert json.loads(out.read_text())["metrics"] == logged and logged["Rollout/line/Episodes"] == 9
    for episode in (0, 1):
        film = (run / "plots" / f"rollout_line_{episode}_00000002.mp4").read_bytes()
        assert (tmp_path / f"v_rollout_line_{episode}.mp4").read_bytes() == film


def test_a_simulator_that_fails_on_one_rank_ends_all_with_its_message(run, tmp_path):
    """Of the second rank's episodes alone."""
    key = "validation.evaluator.rollout.environments.line.success=lost"
    done = torchrun(
        2, "-m", "opentau_train.validate", f"checkpoint={run}", f"out={tmp_path / 'v.json'}", "trust=[tests]", key
    )
    assert done.returncode != 0 and done.stderr.count("a step's info has no 'lost'") == 1, done.stderr
    assert EXIT_USER == 2
