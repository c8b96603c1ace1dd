"""One process, several processes, several micro-batches, sharded: the same training and the same validation."""

import pytest

from tests.modal import MODAL
from tests.nightly import AT_NIGHT, at_night
from tests.program import TOY, assert_close, metrics, run, train_all, train_here

pytestmark = pytest.mark.distributed

STEPS = ["trainer.steps=6", "validation.every=3", "validation.max_samples_per_group=9", "checkpoint.every=3"]


VARIANTS = {
    "ddp_2": (2, ["data.num_workers=1"]),
    "ddp_4": (4, []),
    "ddp_2_x_2_micro_batches": (2, ["data.max_samples_per_batch=1"]),
    "1_x_4_micro_batches": (1, ["data.max_samples_per_batch=1"]),
    "fsdp_2": (2, ["parallelism=fsdp", "parallelism.activation_checkpointing=true", "checkpoint.async=true"]),
    "fsdp_2_x_2_gathered_once": (
        2,
        ["parallelism=fsdp", "parallelism.gather_once=true", "data.max_samples_per_batch=1"],
    ),
    "hsdp_2x2": (4, ["parallelism=hsdp", "parallelism.data_parallel_shard_degree=2", "validation.batch_size=2"]),
}


BY_NIGHT = {"fsdp_4": (4, ["parallelism=fsdp"])}


@pytest.mark.parametrize("variants", [VARIANTS, pytest.param(BY_NIGHT, marks=AT_NIGHT)], ids=["day", "night"])
def test_topology_changes_no_loss_no_batch_and_no_validation(variants, tmp_path):
    runs = {"alone": (1, []), **variants}
    train_all({tmp_path / name: (ranks, [*TOY, *STEPS, *words]) for name, (ranks, words) in runs.items()})
    alone = metrics(tmp_path / "alone")
    for name in variants:
        assert_close(metrics(tmp_path / name), alone, training=1e-4, validation=1e-4, what=name)


@at_night
def test_validation_of_one_checkpoint_is_the_same_on_any_topology(tmp_path):
    """From the same weights (a resumed last step moves none): 1e-6 for other ranks, batch sizes and workers. By day
    test_validation_topology.py has `opentau_train.validate` on them."""
    start = train_here([*TOY, "trainer.steps=2", "validation.every=0", "checkpoint.every=2"], tmp_path / "start")
    found = {}
    frozen = [*TOY, "trainer.steps=3", "validation.every=3", "optimizer.lr=1e-30", "optimizer.weight_decay=0"]
    frozen.append(f"resume={start}")
    found["1"] = metrics(train_here([*frozen, "data.num_workers=3", "validation.batch_size=5"], tmp_path / "a"))[3]
    for ranks, more in ((2, ["validation.batch_size=3"]), (4, ["validation.batch_size=1"])):
        done = run([*frozen, *more, f"paths.run_dir={tmp_path / str(ranks)}"], ranks)
        assert done.returncode == 0, done.stderr
        found[str(ranks)] = metrics(tmp_path / str(ranks))[3]
    names = [k for k in found["1"] if k.startswith("Validation")]
    assert len(names) >= 10
    for ranks in ("2", "4"):
        for name in names:
            assert abs(found[ranks][name] - found["1"][name]) <= 1e-6, (ranks, name)


def test_indivisible_global_batch_names_the_nearest_ones(tmp_path):
    done = run([*TOY, "trainer.global_batch_size=5", f"paths.run_dir={tmp_path / 'run'}"], 2)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if "can't be shared" in line]
    assert len(ours) == 1 and "global batch of 5 can't be shared by 2 ranks" in ours[0]
    assert "global_batch_size=4 or 6" in done.stderr and not (tmp_path / "run").exists()


def test_a_head_that_nothing_supervises_trains_alike_on_any_number_of_ranks(tmp_path):
    """DDP waits for the gradient of every parameter, and a source may supervise one head alone."""
    modes = ["data.sources.main.mode=inverse_dynamics", "data.sources.old.mode=forward_dynamics"]
    some = [*TOY, *MODAL, *modes, "trainer.steps=3"]
    alone = metrics(train_here(some, tmp_path / "one"))
    done = run([*some, f"paths.run_dir={tmp_path / 'two'}"], 2)
    assert done.returncode == 0, done.stderr
    assert "Training/CE" not in alone[3]
    assert_close(metrics(tmp_path / "two"), alone, training=1e-4, validation=1e-4)
