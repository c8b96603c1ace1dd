"""trainer.compile with the default backend, inductor, against eager runs of the same configuration."""

import os

import pytest

from tests.program import NEEDS_COMPILER, TOY, metrics, run

pytestmark = pytest.mark.distributed

SHORT = [*TOY, "trainer.steps=3", "validation.every=3", "logger=none"]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Train once in every form that is asked for; the generated code is shared between the runs."""
    root, done = tmp_path_factory.mktemp("compile"), {}
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def runs(ranks: int, *settings: str) -> dict:
        if (ranks, settings) not in done:
            run_dir = root / str(len(done))
            paths = [f"paths.run_dir={run_dir}", f"paths.cache_dir={root / 'cache'}"]
            ended = run([*SHORT, *settings, *paths], ranks, TORCHINDUCTOR_CACHE_DIR=str(shared / "inductor"))
            assert ended.returncode == 0, ended.stderr[-4000:]
            done[ranks, settings] = metrics(run_dir)
        return done[ranks, settings]

    return runs


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "precision", "layout"),
    [
        (1, "no", ()),
        (2, "no", ()),
        (2, "no", ("parallelism=fsdp",)),
        (2, "bf16", ("parallelism=fsdp", "parallelism.activation_checkpointing=true")),
    ],
    ids=["alone", "ddp_2", "fsdp_2", "fsdp_2_checkpointed_bf16"],
)
def test_compiled_training_has_the_losses_of_eager_training(train, ranks, precision, layout):
    tolerance = 1e-5 if precision == "no" else 1e-2
    eager = train(1, f"trainer.precision={precision}")
    compiled = train(ranks, f"trainer.precision={precision}", "trainer.compile=true", *layout)
    assert compiled.keys() == eager.keys()
    for step, row in eager.items():
        for tag in ("Training/Loss", "Training/GradNorm", "Validation/Loss"):
            if tag in row:
                assert compiled[step][tag] == pytest.approx(row[tag], rel=tolerance), (step, tag)


@pytest.mark.skipif("CXX" in os.environ, reason="the compiler is named, and would be found without PATH")
@pytest.mark.parametrize("ranks", [1, 2])
def test_missing_compiler_is_a_short_error(tmp_path, ranks):
    nowhere = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    ended = run([*SHORT, "trainer.compile=true", f"paths.run_dir={tmp_path / 'run'}"], ranks, **nowhere)
    said = ended.stderr.partition("torch.distributed.elastic")[0].partition("torch/distributed/elastic")[0]
    assert ended.returncode == (2 if ranks == 1 else 1), ended.stderr  # torchrun's own code
    assert said.count("error: the policy can't be compiled by 'inductor'") == 1, ended.stderr
    assert "where:  trainer.compile" in said and "apt-get install g++" in said and "Traceback" not in said, ended.stderr


def test_misspelt_backend_is_named(tmp_path):
    ended = run(
        [*SHORT, "trainer.compile=true", "trainer.compile_backend=inducto", f"paths.run_dir={tmp_path / 'run'}"]
    )
    assert ended.returncode == 2 and "did you mean 'inductor'?" in ended.stderr and "Traceback" not in ended.stderr
