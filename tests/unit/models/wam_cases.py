"""Batches with a future, of samples in every mode, and the smallest policy that learns with them."""

from __future__ import annotations

import dataclasses

import torch

from opentau_train.config.modes import MODES
from opentau_train.data.batch import Batch
from opentau_train.data.fields import FUTURE, Field
from opentau_train.models.wam import WamPolicy
from tests.unit.models import flow_cases

TERMS = {
    "policy": ("mse", "ce"),
    "wam": ("mse", "ce", "vision_mse"),
    "forward_dynamics": ("vision_mse",),
    "inverse_dynamics": ("mse",),
}
SPEC = dataclasses.replace(flow_cases.SPEC, future=3, future_cameras=("left", "wrist"), modes=MODES)
NUM_VALUES = 2 * 3 * (3 * 8 * 8)  # of a frame: 2 x 3 patches of 8 x 8 pixels in three colours


def make_policy(spec=SPEC, seed: int = 0, **changes) -> WamPolicy:
    torch.manual_seed(seed)
    options = dict(width=32, depth=2, heads=2, patch_size=8, stem_channels=8, max_prompt_bytes=32, future_patch_size=8)
    policy = WamPolicy(spec, **{**options, **changes}).eval()
    if spec.future:
        torch.nn.init.normal_(policy.future.out.weight, std=0.1)  # as if trained: it begins at 0
    return policy


def make_batch(modes=MODES, seed: int = 0, spec=SPEC, **changes) -> Batch:
    """A sample of each of `modes`, those of `flow_cases.make_batch` in turn: the second has no picture, the third ends
    early, its last future frame too."""
    num = len(modes)
    plain = flow_cases.make_batch(dataclasses.replace(spec, future=0), num=num, seed=seed)
    generator = torch.Generator().manual_seed(100 + seed)
    frames = (num, spec.future, 3, *spec.image_size)
    has = torch.tensor([mode != "policy" for mode in modes])
    is_pad = (torch.arange(num) == 2)[:, None] & (torch.arange(spec.future) == spec.future - 1) | ~has[:, None]
    added = {
        "future": {
            c: torch.randint(0, 256, frames, generator=generator, dtype=torch.uint8) for c in spec.future_cameras
        },
        "future_mask": {c: plain.camera_mask[c] & has for c in spec.future_cameras},
        "future_is_pad": is_pad,
        "mode_code": torch.tensor([MODES.index(mode) for mode in modes]),
    }
    supervised = torch.tensor([[term in TERMS[mode] for term in ("mse", "ce", "vision_mse")] for mode in modes])
    values = {**plain.values, **added, "mode": list(modes), "supervised": supervised}
    fields = tuple(dataclasses.replace(f, dims=(3,)) if f.name == "supervised" else f for f in plain.fields)
    return Batch((*fields, *FUTURE, Field("mode_code", (), int)), values).replace(**changes)
