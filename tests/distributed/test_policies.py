"""Every policy that ships trains alike in one process and spread over several."""

from __future__ import annotations

import pytest

from tests.pretrained import drawn
from tests.program import TINY_POLICY, TOY, assert_close, metrics, run, train_here

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "ddp_2": (2, []),
    "fsdp_2": (2, ["parallelism=fsdp"]),
    "fsdp_2_checkpointed": (2, ["parallelism=fsdp", "parallelism.activation_checkpointing=true"]),
}
COMPILED = ["trainer.compile=true", "trainer.compile_backend=aot_eager"]
MORE_LAYOUTS = {
    "aot_eager": (1, COMPILED),
    "inductor": (1, ["trainer.compile=true"]),
    "fsdp_2_compiled": (2, ["parallelism=fsdp", "parallelism.activation_checkpointing=true", *COMPILED]),
    "hsdp_2x2": (4, ["parallelism=hsdp", "parallelism.data_parallel_shard_degree=2"]),
}
SMALL_PICTURES = ["model.vision.image_size=32", "model.vision.patch_size=8"]
POLICIES = {
    "act": ["model=act_tiny", "model.dropout=0.0"],
    "diffusion": ["model=diffusion_tiny"],
    "pi0": ["model=pi0_tiny", *SMALL_PICTURES],
    "pi05": ["model=pi05_tiny", "model.action_tokens=binned", "model.insulate=true", *SMALL_PICTURES],
}
TAGS = ("Training/Loss", "Training/GradNorm", "Validation/Loss")


def assert_trains_alike(words: list[str], layouts: dict[str, tuple[int, list[str]]], tmp_path) -> None:
    """The losses, the gradient's norm and a validation over 4 steps are those of one process in all `layouts`."""
    sizes = [word for word in TOY if not word.startswith("model.")]
    words = [*sizes, *words, "trainer.steps=4", "validation.every=4", "logger=none"]
    words += ["validation.max_samples_per_group=4", f"paths.cache_dir={tmp_path / 'cache'}"]
    rows = {}
    for name, (ranks, layout) in {"alone": (1, []), **layouts}.items():
        ended = run([*words, *layout, f"paths.run_dir={tmp_path / name}"], ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        rows[name] = metrics(tmp_path / name)
    for name in layouts:
        for step, row in rows["alone"].items():
            for tag in TAGS:
                if tag in row:
                    assert rows[name][step][tag] == pytest.approx(row[tag], rel=1e-5), (name, step, tag)
    assert "Validation/Loss" in rows["alone"][4]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_trains_alike_in_every_layout(policy, tmp_path):
    assert_trains_alike(POLICIES[policy], LAYOUTS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["true", "false"])
def test_pretrained_encoders_train_alike_in_every_layout(frozen, tmp_path):
    words = [*TINY_POLICY, *drawn(tmp_path), f"model.freeze_encoders={frozen}"]
    assert_trains_alike(words, LAYOUTS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_a_pi_policy_trains_alike_compiled_and_on_four_ranks(policy, tmp_path):
    assert_trains_alike(POLICIES[policy], MORE_LAYOUTS, tmp_path)


def test_first_weights_give_the_same_losses_in_every_layout(tmp_path):
    """Each rank reads what it holds, and the numbers are those of one process."""
    words = [*TOY, "logger=none", "trainer.steps=2", f"paths.cache_dir={tmp_path / 'cache'}"]
    first = train_here([*words, "validation.every=0"], tmp_path / "first")
    weights = [f"model.pretrained_path={first}", "validation.every=2", "validation.max_samples_per_group=4"]
    rows = {}
    for name in ("alone", "ddp_2", "fsdp_2"):
        ranks, layout = LAYOUTS.get(name, (1, []))
        ended = run([*words, *weights, *layout, f"paths.run_dir={tmp_path / name}"], ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ended.stderr.count("tensors, from") == 1, "rank 0 reports"
        rows[name] = metrics(tmp_path / name)
    assert rows["alone"][1]["Training/Loss"] < 0.99 * metrics(first)[1]["Training/Loss"]
    for name in ("ddp_2", "fsdp_2"):
        assert_close(rows["alone"], rows[name], training=1e-5, validation=1e-5)
