"""LoRA adapters, frozen weights and reduced precision train alike in one process and however several share a policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.nightly import at_night
from tests.program import NEEDS_COMPILER, TOY, Runs, metrics, train_all

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]  # several launches a test


LAYOUTS = {
    "alone": (1, []),
    "ddp_2": (2, []),
    "fsdp_2": (2, ["parallelism=fsdp"]),
    "fsdp_2_checkpointed": (2, ["parallelism=fsdp", "parallelism.activation_checkpointing=true"]),
    "hsdp_2x2": (4, ["parallelism=hsdp", "parallelism.data_parallel_shard_degree=2"]),
    "compiled": (1, ["trainer.compile=true", "trainer.compile_backend=aot_eager"]),
    "inductor": (1, ["trainer.compile=true"]),
}
TAGS = ("Training/Loss", "Training/GradNorm")
SHORT = ["trainer.steps=4", "validation.every=0", "checkpoint.every=0", "logger=none"]
LORA = ["finetune=lora", "finetune.rank=4", "optimizer.lr=1e-2", "trainer.ema_decay=0.5"]
HEADS = {"flow": "*_out.*", "pi0": "action_out_proj.*"}
PI = ["model=pi0_tiny", "model.vision.image_size=32", "model.vision.patch_size=8"]
MODELS = {"flow": TOY, "pi0": [*(word for word in TOY if not word.startswith("model.")), *PI]}
WEIGHTS = "checkpoints/last/pretrained_model/model.safetensors"


def in_layouts(words: list[str], layouts: list[str], folder: Path) -> Runs:
    """A run of `words` in each of `layouts`, in a directory of `folder` of its name."""
    return {folder / name: (LAYOUTS[name][0], [*words, *LAYOUTS[name][1]]) for name in layouts}


def of_adapters(policy: str, layouts: list[str], root: Path) -> Runs:
    """Runs of LoRA adapters in each of `layouts`, and before them the run whose weights they adapt."""
    model, base = [*MODELS[policy], *SHORT], root / f"{policy}_base"
    words = [*model, *LORA, f"finetune.trains=[{HEADS[policy]}]", f"model.pretrained_path={base / WEIGHTS}"]
    return {base: (1, [*model, "trainer.steps=1"])} | in_layouts(words, layouts, root / policy)


def assert_alike(folder: Path, layouts: list[str]) -> None:
    """The losses and the gradient's norms are those of the run `alone` in each step."""
    alone = metrics(folder / "alone")
    assert list(alone) == [1, 2, 3, 4]
    for name in layouts:
        rows = metrics(folder / name)
        assert rows.keys() == alone.keys()
        for step, row in rows.items():
            for tag in TAGS:
                assert row[tag] == pytest.approx(alone[step][tag], rel=1e-5), (folder.name, name, step, tag)


def test_adapters_and_frozen_layers_train_alike_in_every_layout(tmp_path):
    adapters = {"flow": ["alone", "ddp_2"], "pi0": ["alone", "fsdp_2_checkpointed"]}
    frozen = ["alone", "fsdp_2_checkpointed"]
    freeze = [*TOY, *SHORT, "model.depth=2", "finetune=freeze", "finetune.frozen=[layers.0.*,stem.*,*embed*]"]
    runs = in_layouts(freeze, frozen, tmp_path / "frozen")
    for policy, layouts in adapters.items():
        runs |= of_adapters(policy, layouts, tmp_path)
    train_all(runs)
    assert_alike(tmp_path / "frozen", frozen)
    for policy, layouts in adapters.items():
        assert_alike(tmp_path / policy, layouts)
        weights = load_file(tmp_path / policy / "alone" / WEIGHTS)
        assert weights and all("lora_" in name or "_out" in name for name in weights)
        assert all(value.abs().max() > 1e-3 for name, value in weights.items() if ".lora_B." in name)
        for name in layouts:
            assert load_file(tmp_path / policy / name / WEIGHTS).keys() == weights.keys()


@at_night
def test_adapters_train_alike_in_further_layouts(tmp_path):
    """By day shards have pi0's adapters, four ranks the policy without them (test_topology.py), and shards without them
    are compiled (test_policies.py): these are their combinations."""
    layouts = {
        "flow": ["alone", "fsdp_2_checkpointed", "fsdp_2", "hsdp_2x2", "compiled"],
        "pi0": ["alone", "compiled"],
    }
    train_all({run: how for name, some in layouts.items() for run, how in of_adapters(name, some, tmp_path).items()})
    for name, some in layouts.items():
        assert_alike(tmp_path / name, some)


@NEEDS_COMPILER
@at_night
def test_adapters_train_alike_compiled_by_inductor(tmp_path):
    train_all(of_adapters("flow", ["alone", "inductor"], tmp_path))
    assert_alike(tmp_path / "flow", ["inductor"])


def test_sharded_bfloat16_parameters_train_and_go_on_in_one_process(tmp_path):
    words = [*TOY, *SHORT, *LORA, "trainer.precision=bf16_params"]
    sharded, alone, resumed = (tmp_path / name for name in ("sharded", "alone", "resumed"))
    train_all({sharded: (2, [*words, "parallelism=fsdp", "trainer.steps=2"])})
    assert {value.dtype for value in load_file(sharded / WEIGHTS).values()} == {torch.bfloat16}
    train_all({alone: (1, words), resumed: (1, [*words, f"resume={sharded}"])})
    expected, rows = metrics(alone), metrics(resumed)
    assert list(rows) == [3, 4]
    for step, row in rows.items():
        assert row["Training/Loss"] == pytest.approx(expected[step]["Training/Loss"], rel=1e-2), step
