"""From samples to batches and back together. No randomness, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opentau_train.types import Batch, BatchSpec, Provenance, Sample


def collate(samples: Sequence[Sample], spec: BatchSpec) -> Batch:
    """Stack samples; a camera that a sample lacks is black with `camera_mask` False. See `Batch` for shapes."""
    images, camera_mask = {}, {}
    for camera in spec.cameras:
        stacked = np.empty((len(samples), spec.history + 1, *spec.image_size, 3), np.uint8)
        for place, sample in zip(stacked, samples, strict=True):
            place[:] = sample.images.get(camera, 0)
        # Channels stay last in memory: to move them costs more than to copy the picture, and the device does it faster.
        images[camera] = torch.from_numpy(stacked).movedim(-1, 2)
        camera_mask[camera] = torch.tensor([camera in s.images for s in samples])
    where = [s.provenance for s in samples]
    return Batch(
        images=images,
        camera_mask=camera_mask,
        state=_stack([s.state for s in samples]),
        state_dim_mask=_stack([s.state_dim_mask for s in samples]),
        actions=_stack([s.actions for s in samples]),
        action_is_pad=_stack([s.action_is_pad for s in samples]),
        action_dim_mask=_stack([s.action_dim_mask for s in samples]),
        prompt=[s.prompt for s in samples],
        mode=[s.mode for s in samples],
        key=torch.from_numpy(np.array([s.key for s in samples], np.uint64).view(np.int64)),
        group=torch.tensor([p.group for p in where]),
        dataset_index=torch.tensor([p.dataset_index for p in where]),
        episode_index=torch.tensor([p.episode_index for p in where]),
        frame_index=torch.tensor([p.frame_index for p in where]),
        pass_index=torch.tensor([p.pass_index for p in where]),
        norm_head=[p.norm_head for p in where],
        weight=torch.tensor([s.weight for s in samples], dtype=torch.float32),
    )


def _stack(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))


def join(parts: Sequence[Batch], order: Sequence[int]) -> Batch:
    """One batch of several, rows rearranged: row i of the result is row `order[i]` of the parts laid end to end."""
    if len(parts) == 1 and list(order) == list(range(len(order))):
        return parts[0]
    index = torch.tensor(order)

    def tensors(name: str, key: str | None = None) -> torch.Tensor:
        values = [getattr(p, name) if key is None else getattr(p, name)[key] for p in parts]
        if name == "images":  # copied as they lie in memory, see `collate`
            return torch.cat([v.movedim(2, -1) for v in values])[index].movedim(-1, 2)
        return torch.cat(values)[index]

    def field(name: str):
        first = getattr(parts[0], name)
        if isinstance(first, dict):
            return {key: tensors(name, key) for key in first}
        if isinstance(first, list):
            flat = [item for p in parts for item in getattr(p, name)]
            return [flat[i] for i in order]
        return tensors(name)

    return Batch(**{name: field(name) for name in Batch.__dataclass_fields__})


def blank_batch(spec: BatchSpec) -> Batch:
    """One sample of weight 0 in which nothing is present: for a rank that has none but must take part in a forward."""
    provenance = Provenance(0, "", 0, "", 0, 0, 0)
    sample = Sample(
        images={},
        state=np.zeros(spec.state_dim, np.float32),
        actions=np.zeros((spec.chunk_length, spec.action_dim), np.float32),
        state_dim_mask=np.zeros(spec.state_dim, bool),
        action_is_pad=np.ones(spec.chunk_length, bool),
        action_dim_mask=np.zeros(spec.action_dim, bool),
        prompt="",
        mode="policy",
        key=0,
        provenance=provenance,
        weight=0.0,
    )
    return collate([sample], spec)
