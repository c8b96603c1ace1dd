"""LoRA adapters, frozen weights and reduced precision train alike in one process and however several share a policy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.program import TOY, metrics, run, train_here

pytestmark = pytest.mark.distributed


LAYOUTS = {
    "ddp_2": (2, []),
    "fsdp_2": (2, ["parallelism=fsdp"]),
    "fsdp_2_checkpointed": (2, ["parallelism=fsdp", "parallelism.activation_checkpointing=true"]),
    "hsdp_2x2": (4, ["parallelism=hsdp", "parallelism.data_parallel_shard_degree=2"]),
    "compiled": (1, ["trainer.compile=true", "trainer.compile_backend=aot_eager"]),
}
TAGS = ("Training/Loss", "Training/GradNorm")
SHORT = ["trainer.steps=4", "validation.every=0", "checkpoint.every=0", "logger=none"]
LORA = ["finetune=lora", "finetune.rank=4", "optimizer.lr=1e-2", "trainer.ema_decay=0.5"]
HEADS = {"flow": "*_out.*", "pi0": "action_out_proj.*"}
PI = ["model=pi0_tiny", "model.vision.image_size=32", "model.vision.patch_size=8"]
MODELS = {"flow": TOY, "pi0": [*(word for word in TOY if not word.startswith("model.")), *PI]}
WEIGHTS = "checkpoints/last/pretrained_model/model.safetensors"


def trained(words: list[str], run_dir: Path, ranks: int) -> Path:
    ended = run([*words, f"paths.run_dir={run_dir}", f"paths.cache_dir={run_dir.parent / 'cache'}"], ranks)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return run_dir


@pytest.mark.parametrize(("policy", "layouts"), [("flow", LAYOUTS), ("pi0", ["fsdp_2_checkpointed", "compiled"])])
def test_adapters_over_frozen_weights_train_alike_in_every_layout(policy, layouts, tmp_path):
    model = MODELS[policy]
    plain = train_here([*model, *SHORT, "trainer.steps=1"], tmp_path / "plain")
    base = shutil.copy(plain / WEIGHTS, tmp_path / "base.safetensors")
    words = [*model, *SHORT, *LORA, f"finetune.trains=[{HEADS[policy]}]", f"model.pretrained_path={base}"]
    alone = train_here(words, tmp_path / "alone")
    weights, rows = load_file(alone / WEIGHTS), metrics(alone)
    assert weights and all("lora_" in name or "_out" in name for name in weights)
    assert all(value.abs().max() > 1e-3 for name, value in weights.items() if ".lora_B." in name)
    for name in layouts:
        ranks, layout = LAYOUTS[name]
        other = trained([*words, *layout], tmp_path / name, ranks)
        assert len(metrics(other)) == 4
        for step, row in metrics(other).items():
            for tag in TAGS:
                assert row[tag] == pytest.approx(rows[step][tag], rel=1e-5), (name, step, tag)
        assert load_file(other / WEIGHTS).keys() == weights.keys()


@pytest.mark.parametrize("layout", ["ddp_2", "fsdp_2_checkpointed"])
def test_a_policy_with_frozen_layers_trains_alike(layout, tmp_path):
    words = [*TOY, *SHORT, "model.depth=2", "finetune=freeze", "finetune.frozen=[layers.0.*,stem.*,*embed*]"]
    alone, ranks = metrics(train_here(words, tmp_path / "alone")), LAYOUTS[layout][0]
    other = metrics(trained([*words, *LAYOUTS[layout][1]], tmp_path / layout, ranks))
    for step, row in alone.items():
        for tag in TAGS:
            assert other[step][tag] == pytest.approx(row[tag], rel=1e-5), (step, tag)


def test_sharded_bfloat16_parameters_train_and_go_on_in_one_process(tmp_path):
    words = [*TOY, *SHORT, *LORA, "trainer.precision=bf16_params"]
    sharded = trained([*words, "parallelism=fsdp", "trainer.steps=2"], tmp_path / "sharded", 2)
    assert {value.dtype for value in load_file(sharded / WEIGHTS).values()} == {torch.bfloat16}
    alone = metrics(trained(words, tmp_path / "alone", 1))
    resumed = metrics(trained([*words, "resume=auto"], sharded, 1))
    for step, row in resumed.items():
        assert row["Training/Loss"] == pytest.approx(alone[step]["Training/Loss"], rel=1e-2), step
