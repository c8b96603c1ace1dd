"""From samples to batches and back together. No randomness, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opentau_train.data.decode.images import centred
from opentau_train.types import Batch, BatchSpec, Provenance, Sample


def collate(samples: Sequence[Sample], spec: BatchSpec) -> Batch:
    """Stack samples; a camera that a sample lacks is black with `camera_mask` False, and a picture smaller than the
    spec's is centred on black. See `Batch` for shapes."""
    where = [s.provenance for s in samples]
    images, camera_mask = {}, {}
    for camera in spec.cameras:
        stacked = np.zeros((len(samples), spec.history + 1, *spec.image_size, 3), np.uint8)
        middle: dict[tuple[int, ...], np.ndarray] = {}  # where pictures of a shape go
        for i, sample in enumerate(samples):
            image = sample.images.get(camera)
            if image is not None:
                if image.shape not in middle:
                    middle[image.shape] = centred(stacked, *image.shape[1:3])
                middle[image.shape][i] = image
        # Channels stay last in memory: to move them costs more than to copy the picture, and the device does it faster.
        images[camera] = torch.from_numpy(stacked).movedim(-1, 2)
        camera_mask[camera] = torch.tensor([camera in s.images for s in samples])
    places = [(p.group, p.dataset_index, p.episode_index, p.frame_index, p.pass_index) for p in where]
    group, dataset_index, episode_index, frame_index, pass_index = torch.from_numpy(np.array(places).T.copy())
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
        group=group,
        dataset_index=dataset_index,
        episode_index=episode_index,
        frame_index=frame_index,
        pass_index=pass_index,
        norm_head=[p.norm_head for p in where],
        weight=torch.tensor([s.weight for s in samples], dtype=torch.float32),
    )


def _stack(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.array(arrays))  # a third of what np.stack takes


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
