"""The same weights, the same numbers: on 1, 2, 4 and 8 processes, replicated or sharded, with idle or failing ranks."""

import json
import shutil
import sys

import pytest

from opentau_train.errors import EXIT_USER
from tests import warm
from tests.nightly import by_day
from tests.program import DATA, TOY, environment, metrics, train_here

pytestmark = pytest.mark.distributed

SHARDED = ["parallelism.data_parallel_shard_degree=2"]
BATCH = 3
"""The batch size of most passes here: with the same one, even the last bits agree."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run whose last step logged a full validation, with the average's and the actions'."""
    overrides = [
        "trainer.steps=3",
        "trainer.ema_decay=0.5",
        "validation.evaluators=[loss,action]",
        "validation.every=3",
    ]
    overrides += [f"validation.batch_size={BATCH}", "validation.max_samples_per_group=11"]
    return train_here([*TOY, *overrides], tmp_path_factory.mktemp("frozen") / "run")


def validate(checkpoint, out, ranks, *arguments):
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command += ["opentau_train.validate", f"checkpoint={checkpoint}", f"out={out}", *arguments]
    command += [f"paths.cache_dir={checkpoint.parent / 'cache'}", "trainer.step_timeout=120"]
    return warm.run(command, env=environment(), timeout=280)


TOPOLOGIES = {
    "1": (1, []),
    "2": (2, ["data.num_workers=1"]),
    "4": (4, []),
    "8": (8, []),
    "fsdp_2": (2, SHARDED),
    "hsdp_2x2": (4, [*SHARDED, "data.num_workers=1"]),
}


@pytest.mark.parametrize("topology", by_day(TOPOLOGIES, "1", "8", "hsdp_2x2"))
def test_one_checkpoint_gives_the_same_numbers_on_every_topology(topology, checkpoint, tmp_path):
    """At one batch size the same bits: one topology twice, and here every one. Losses, average, actions, picture."""
    ranks, arguments = TOPOLOGIES[topology]
    done = validate(checkpoint, tmp_path / "v.json", ranks, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"written to {tmp_path / 'v.json'}") == 1 and "main/default" in done.stderr, done.stderr
    logged = {k: v for k, v in metrics(checkpoint)[3].items() if k.startswith("Validation")}
    result = json.loads((tmp_path / "v.json").read_text())
    assert result["ranks"] == ranks and result["metrics"].keys() == logged.keys() and len(logged) > 60
    for tag, value in logged.items():
        # What is promised across topologies is 1e-6; one process is the topology that logged it.
        assert abs(result["metrics"][tag] - value) <= (0.0 if topology == "1" else 1e-6), tag
    assert (tmp_path / "v_actions.png").read_bytes() == (checkpoint / "plots" / "actions_00000003.png").read_bytes()


@pytest.mark.parametrize(("ranks", "batch_size", "workers"), by_day([(2, 7, 0), (4, 1, 1), (2, 64, 2)], (4, 1, 1)))
def test_batch_size_and_workers_change_no_number(ranks, batch_size, workers, checkpoint, tmp_path):
    more = [f"validation.batch_size={batch_size}", f"data.num_workers={workers}"]
    done = validate(checkpoint, tmp_path / "v.json", ranks, *more)
    assert done.returncode == 0, done.stderr
    logged = metrics(checkpoint)[3]
    for tag, value in json.loads((tmp_path / "v.json").read_text())["metrics"].items():
        assert abs(logged[tag] - value) <= 1e-6, tag


@pytest.mark.parametrize("arguments", by_day([[], SHARDED], SHARDED), ids=["ddp", "fsdp"])
def test_ranks_without_a_window_take_part(arguments, checkpoint, tmp_path):
    """Two windows in all and four ranks; sharded, every forward of the others needs all of them."""
    one = [*arguments, "data.sources.main.val_split_ratio=0", "validation.max_samples_per_group=2"]
    done = validate(checkpoint, tmp_path / "v4.json", 4, *one, "validation.batch_size=1")
    assert done.returncode == 0, done.stderr
    done = validate(checkpoint, tmp_path / "v1.json", 1, *one[len(arguments) :])
    assert done.returncode == 0, done.stderr
    few, alone = (json.loads((tmp_path / name).read_text())["metrics"] for name in ("v4.json", "v1.json"))
    assert few["Validation/old/default/MSE/N"] == 2.0 and few.keys() == alone.keys()
    assert all(abs(few[tag] - alone[tag]) <= 1e-6 for tag in alone)


@pytest.mark.parametrize("arguments", by_day([[], SHARDED], SHARDED), ids=["ddp", "fsdp"])
def test_a_corrupt_window_of_one_rank_ends_all_ranks_with_its_name_or_is_left_out(arguments, checkpoint, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(DATA / "lerobot_v21", root)
    (video,) = root.rglob("episode_000002.mp4")
    video.chmod(0o644)
    video.write_bytes(video.read_bytes()[:200])
    damaged = [*arguments, f"data.sources.old.root={root}", "data.sources.old.val_episodes=[0,2]"]
    done = validate(checkpoint, tmp_path / "v.json", 2, *damaged)
    assert done.returncode != 0 and "dataset 'old', episode 2, frame" in done.stderr
    assert done.stderr.count("Traceback") == 1 and "ChildFailedError" in done.stderr, "torchrun's own only"
    assert done.stderr.count("error: a validation window can't be read") == 1
    assert f"exitcode  : {EXIT_USER}" in done.stderr or "exitcode" in done.stderr
    done = validate(checkpoint, tmp_path / "v.json", 2, *damaged, "validation.on_bad_sample=skip")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "v.json").read_text())
    assert {(b["dataset"], b["episode"]) for b in result["left_out"]} == {("old", 2)}
    assert result["metrics"]["Validation-LeftOut/Windows"] == len(result["left_out"]) > 0
    assert "left out" in done.stderr
