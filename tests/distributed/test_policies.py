"""Every policy that ships trains alike in one process and spread over several."""

from __future__ import annotations

import pytest

from tests.program import TOY, metrics, run

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "ddp_2": (2, []),
    "fsdp_2": (2, ["parallelism=fsdp"]),
    "fsdp_2_checkpointed": (2, ["parallelism=fsdp", "parallelism.activation_checkpointing=true"]),
}
SMALL_PICTURES = ["model.vision.image_size=32", "model.vision.patch_size=8"]
POLICIES = {
    "act": ["model=act_tiny", "model.dropout=0.0"],
    "pi0": ["model=pi0_tiny", *SMALL_PICTURES],
    "pi05": ["model=pi05_tiny", "model.action_tokens=binned", "model.insulate=true", *SMALL_PICTURES],
}
TAGS = ("Training/Loss", "Training/GradNorm", "Validation/Loss")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_trains_alike_in_every_layout(policy, tmp_path):
    sizes = [word for word in TOY if not word.startswith("model.")]
    words = [*sizes, *POLICIES[policy], "trainer.steps=3", "validation.every=3", "logger=none"]
    words += ["validation.max_samples_per_group=4", f"paths.cache_dir={tmp_path / 'cache'}"]
    rows = {}
    for name, (ranks, layout) in {"alone": (1, []), **LAYOUTS}.items():
        ended = run([*words, *layout, f"paths.run_dir={tmp_path / name}"], ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        rows[name] = metrics(tmp_path / name)
    for name in LAYOUTS:
        for step, row in rows["alone"].items():
            for tag in TAGS:
                if tag in row:
                    assert rows[name][step][tag] == pytest.approx(row[tag], rel=1e-5), (name, step, tag)
    assert "Validation/Loss" in rows["alone"][3]
