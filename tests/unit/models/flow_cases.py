"""Small batches with every kind of padding, and the smallest policy that has all inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from opentau_train.data.batch import Batch
from opentau_train.data.fields import FIELDS
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.models.flow import FlowPolicy
from opentau_train.models.inputs import SUPERVISES, Supervise, TokenizeBytes
from opentau_train.types import BatchSpec

SPEC = BatchSpec(cameras=("wrist", "left"), image_size=(16, 24), history=1, state_dim=5, action_dim=4, chunk_length=6)
PROMPTS = ["put the cup on the plate", "", "öffne die Schublade", "x" * 500]


def make_policy(spec: BatchSpec = SPEC, seed: int = 0, **changes) -> FlowPolicy:
    torch.manual_seed(seed)
    options = dict(width=32, depth=2, heads=2, patch_size=8, stem_channels=8, max_prompt_bytes=32)
    return FlowPolicy(spec, **{**options, **changes})


def make_batch(spec: BatchSpec = SPEC, num: int = 4, seed: int = 0, num_bytes: int = 32, **changes) -> Batch:
    """Sample 0 is whole; 1 has no prompt, no state, no camera; 2 ends early and lacks dims; 3 is whole. `changes`
    replace fields; tokens and supervision follow from `prompt` and `mode`, as the policy's transforms make them."""
    g = torch.Generator().manual_seed(seed)
    frames = (num, spec.history + 1, 3, *spec.image_size)
    index = torch.arange(num)
    is_pad = torch.zeros(num, spec.chunk_length, dtype=torch.bool)
    is_pad[2:3, 4:] = True
    dims = torch.ones(num, spec.action_dim, dtype=torch.bool)
    dims[2:3, -1] = False
    state_dims = torch.ones(num, spec.state_dim, dtype=torch.bool)
    state_dims[1:2] = False
    state_dims[2:3, -2:] = False
    prompts = changes.get("prompt", [PROMPTS[i % len(PROMPTS)] for i in range(num)])
    modes = changes.get("mode", ["policy"] * num)
    made = Pipeline({"tokenize": TokenizeBytes(num_bytes), "supervise": Supervise(("mse", "ce"), SUPERVISES)})
    rows = [made({"prompt": p, "mode": m}, 0, training=True) for p, m in zip(prompts, modes, strict=True)]
    values = dict(
        images={c: torch.randint(0, 256, frames, generator=g, dtype=torch.uint8) for c in spec.cameras},
        camera_mask={c: index != 1 for c in spec.cameras},
        state=torch.randn(num, spec.state_dim, generator=g) * state_dims,
        state_dim_mask=state_dims,
        actions=torch.randn(num, spec.chunk_length, spec.action_dim, generator=g) * dims[:, None],
        action_is_pad=is_pad,
        action_dim_mask=dims,
        prompt=prompts,
        mode=modes,
        key=index,
        group=index,
        dataset_index=index,
        dataset_repo_id=["arm"] * num,
        episode_index=index,
        frame_index=index,
        pass_index=index,
        norm_head=["arm::joint"] * num,
        weight=torch.ones(num),
        **{name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("prompt_tokens", "supervised")},
    )
    fields = FIELDS + tuple(field for t in made.transforms.values() for field in t.fields(spec))
    assert {f.name for f in fields} == set(values)
    return Batch(fields, {**values, **changes})


@dataclass(frozen=True)
class Noise:
    """Draws that are given: `noise` [B, T, A] f32, `time` [B] f32."""

    noise: torch.Tensor
    time: torch.Tensor

    def normal(self, name: str, shape) -> torch.Tensor:
        assert self.noise.shape[1:] == tuple(shape)
        return self.noise

    def uniform(self, name: str) -> torch.Tensor:
        return self.time


def make_noise(batch: Batch, seed: int = 0) -> Noise:
    g = torch.Generator().manual_seed(seed)
    return Noise(torch.randn(batch.actions.shape, generator=g), torch.rand(len(batch), generator=g))


def total(policy: FlowPolicy, terms) -> torch.Tensor:
    """The loop's loss of one batch."""
    return sum(policy.loss_weights[t] * s.sum() / c.sum().clamp(min=1) for t, (s, c) in terms.items())


def with_garbage(batch: Batch) -> Batch:
    """The same batch, what its masks say is missing holding NaN, or other pictures."""
    real = ~batch.action_is_pad[:, :, None] & batch.action_dim_mask[:, None, :]
    seen = {c: mask[:, None, None, None, None] for c, mask in batch.camera_mask.items()}
    return batch.replace(
        actions=torch.where(real, batch.actions, float("nan")),
        state=torch.where(batch.state_dim_mask, batch.state, float("nan")),
        images={c: torch.where(seen[c], frames, 255 - frames) for c, frames in batch.images.items()},
    )
