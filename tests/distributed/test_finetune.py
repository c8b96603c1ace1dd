"""LoRA adapters train alike in one process and however several share the policy."""

from __future__ import annotations

import pytest
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
LORA = ["finetune=lora", "finetune.rank=4", "finetune.trains=[*_out.*]", "optimizer.lr=1e-2", "trainer.ema_decay=0.5"]
WORDS = [*TOY, *LORA, "trainer.steps=4", "validation.every=0", "logger=none"]


def test_adapters_train_alike_in_every_layout(tmp_path):
    alone = metrics(train_here(WORDS, tmp_path / "alone"))
    weights = load_file(tmp_path / "alone/checkpoints/last/pretrained_model/model.safetensors")
    assert all(value.abs().max() > 1e-3 for name, value in weights.items() if ".lora_B." in name)
    for name, (ranks, layout) in LAYOUTS.items():
        words = [*WORDS, *layout, f"paths.run_dir={tmp_path / name}", f"paths.cache_dir={tmp_path / 'cache'}"]
        ended = run(words, ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        rows = metrics(tmp_path / name)
        assert len(rows) == 4
        for step, row in alone.items():
            for tag in TAGS:
                assert rows[step][tag] == pytest.approx(row[tag], rel=1e-5), (name, step, tag)
        others = load_file(tmp_path / name / "checkpoints/last/pretrained_model/model.safetensors")
        assert others.keys() == weights.keys()
