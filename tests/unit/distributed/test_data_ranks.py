"""Which share of the data a rank reads is asked of `data_rank` and `data_size`, never of the processes' numbers."""

import ast
import json
from pathlib import Path

import torch

from opentau_train.data.load.stream import training_batches
from opentau_train.distributed.performance import Stamp
from opentau_train.distributed.world import World
from opentau_train.metrics.recorder import FOLDER, FlightRecorder
from opentau_train.step import StepTaken, TrainState
from tests.fake_source import ONE, mixture_of

PACKAGE = Path(__file__).parents[3] / "opentau_train"

PROCESSES = {
    "checkpoints/contents.py",  # random states, a file a process
    "checkpoints/saver.py",  # what each process writes
    "distributed/",
    "checkpoints/place.py",  # which of a checkpoint's files each process looks at
    "metrics/recorder.py",  # a file a process
    "metrics/meter.py",  # what each process's device does
    "step.py",  # ambient randomness of each process
    "tools/rollout.py",  # how many processes there were
    "loop.py",  # the watchdog of each process
    "validation/evaluator.py",  # which process failed
    "validate.py",  # how many processes there were
}
"""Where a world's `rank` and `size` mean processes."""


class TwoShareOne(World):
    """Two processes that hold one policy between them, of a launch of four: they read the same data."""

    @property
    def data_rank(self) -> int:
        return self.rank // 2

    @property
    def data_size(self) -> int:
        return self.size // 2


def asks_for_processes(source: str) -> bool:
    """Whether the module reads `rank` or `size` of something called `world`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("rank", "size"):
            name = getattr(node.value, "id", None) or getattr(node.value, "attr", None)
            if name == "world":
                return True
    return False


def test_only_what_is_about_processes_asks_for_their_numbers():
    asking = [f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*.py") if asks_for_processes(f.read_text())]
    assert asking and not [file for file in asking if not file.startswith(tuple(PROCESSES))]


def test_processes_that_share_a_policy_record_the_same_samples_in_files_of_their_own(tmp_path):
    mixture = mixture_of({"d": "9,9,9,9,9,9"}, tmp_path / "cache", num_workers=0, lanes_per_sample=1)
    tape = mixture.tape(4)
    policy = torch.nn.Module()
    policy.loss_weights = {"mse": 1.0}
    recorded = []
    for rank in range(4):
        world = TwoShareOne(**{**vars(ONE), "rank": rank, "size": 4})
        options = {"rank": world.data_rank, "size": world.data_size, "first_step": 0, "last_step": 1}
        part = next(training_batches(mixture, tape, quarantine=tmp_path / "quarantine.jsonl", **options))
        losses = [(torch.zeros(2), {"mse": (torch.ones(2), torch.ones(2))})]
        taken = StepTaken(losses, torch.arange(2), torch.tensor(1.0), 1e-3, (Stamp(world.device),) * 3)
        with FlightRecorder(tmp_path, tape, mixture, world) as recorder:
            recorder.write(TrainState(policy, None, None, None, step=1), part.batch, taken)
        (file,) = (tmp_path / FOLDER).glob(f"rank{rank:05d}-*.jsonl")
        recorded.append(json.loads(file.read_text()))
    assert [line["t"] for line in recorded] == [[0, 2], [0, 2], [1, 3], [1, 3]]
    assert recorded[0]["frame"] == recorded[1]["frame"] and len(recorded[0]["frame"]) == 2
