"""trainer.compile with the default backend, inductor, against eager runs of the same configuration."""

import os

import pytest

from tests.nightly import at_night, by_day
from tests.program import NEEDS_COMPILER, TOY, metrics, run, train_all

pytestmark = pytest.mark.distributed

SHORT = [*TOY, "trainer.steps=3", "validation.every=3", "logger=none"]


COMPILED = ["trainer.compile=true"]
FSDP = ["parallelism=fsdp"]
BF16 = ["trainer.precision=bf16"]
RUNS = {
    "eager": (1, []),
    "eager_bf16": (1, BF16),
    "alone": (1, COMPILED),
    "ddp_2": (2, COMPILED),
    "fsdp_2": (2, [*COMPILED, *FSDP]),
    "fsdp_2_checkpointed_bf16": (2, [*COMPILED, *FSDP, "parallelism.activation_checkpointing=true", *BF16]),
}


@NEEDS_COMPILER
@at_night
@pytest.mark.timeout(900)  # several launches
def test_compiled_training_has_the_losses_of_eager_training(tmp_path):
    """By day test_policies.py compiles shards, and test_finetune.py one process, by aot_eager."""
    train_all({tmp_path / name: (ranks, [*SHORT, *words]) for name, (ranks, words) in RUNS.items()})
    for name, (_, words) in RUNS.items():
        reference, tolerance = ("eager_bf16", 1e-2) if BF16[0] in words else ("eager", 1e-5)
        eager, rows = metrics(tmp_path / reference), metrics(tmp_path / name)
        assert rows.keys() == eager.keys()
        for step, row in eager.items():
            for tag in {"Training/Loss", "Training/GradNorm", "Validation/Loss"} & row.keys():
                assert rows[step][tag] == pytest.approx(row[tag], rel=tolerance), (name, step, tag)


@pytest.mark.skipif("CXX" in os.environ, reason="the compiler is named, and would be found without PATH")
@pytest.mark.parametrize("ranks", by_day([1, 2], 1))
def test_missing_compiler_is_a_short_error(tmp_path, ranks):
    nowhere = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    ended = run([*SHORT, "trainer.compile=true", f"paths.run_dir={tmp_path / 'run'}"], ranks, **nowhere)
    said = ended.stderr
    assert ended.returncode == (2 if ranks == 1 else 1), ended.stderr  # torchrun's own code
    assert said.count("error: the policy can't be compiled by 'inductor'") == 1, ended.stderr
    assert "where:  trainer.compile" in said and "apt-get install g++" in said, said
    assert said.count("Traceback") == ranks - 1, "there is none but torchrun's"


def test_misspelt_backend_is_named(tmp_path):
    ended = run(
        [*SHORT, "trainer.compile=true", "trainer.compile_backend=inducto", f"paths.run_dir={tmp_path / 'run'}"]
    )
    assert ended.returncode == 2 and "did you mean 'inductor'?" in ended.stderr and "Traceback" not in ended.stderr
