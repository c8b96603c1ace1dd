"""From a window's address to a sample: read, drop, normalise, pad. Lives in a loader worker.

All randomness of a sample is keyed by (seed, dataset, episode, frame, pass), so it depends on no rank, worker or batch.
"""

from __future__ import annotations

import numpy as np

from opentau_train import rng
from opentau_train.data.decode.video import OpenDecoders, reader_bytes
from opentau_train.data.mixture.mixture import Dataset, Mixture
from opentau_train.data.source import Cursor, CursorFactory
from opentau_train.types import Provenance, RawWindow, Sample, WindowSpec

_INPUTS = rng.key("inputs") >> 1


class SampleBuilder:
    """Builds samples of a mixture in one process. `train` turns the configured dropout on.

    Cursors are kept per lane: a lane reads forward, so each frame is decoded once. Raises `BadSample` for a window
    that can't be read; the builder stays usable.
    """

    def __init__(self, mixture: Mixture, *, train: bool):
        self.mixture = mixture
        self.train = train
        self._keys = [rng.key(mixture.seed, "sample", d.name) for d in mixture.datasets]
        self._masks: dict[tuple[int, int], np.ndarray] = {}
        self._factories: dict[int, CursorFactory] = {}
        self._lanes: dict[int, tuple[int, Cursor]] = {}
        self.open_decoders = OpenDecoders()

    def build(self, lane: int, dataset: int, episode: int, frame: int, pass_index: int, *, ahead: int = 0) -> Sample:
        """The sample of the window at `frame` of the episode at position `episode`, read through `lane`'s cursor, which
        will be asked for the `ahead` windows that follow it."""
        raw = self._cursor(lane, dataset).read(episode, frame, ahead)
        return self._finish(self.mixture.datasets[dataset], raw, episode, frame, pass_index)

    def close(self) -> None:
        for _, cursor in self._lanes.values():
            cursor.close()
        for factory in self._factories.values():
            factory.close()
        self._lanes.clear()
        self._factories.clear()
        self.open_decoders = OpenDecoders()

    def _cursor(self, lane: int, dataset: int) -> Cursor:
        held = self._lanes.get(lane)
        if held is not None and held[0] == dataset:
            return held[1]
        if held is not None:
            held[1].close()
            self.open_decoders -= self._decoders_of(held[0])
        if dataset not in self._factories:
            chosen = self.mixture.datasets[dataset]
            spec = self.mixture.spec
            window = WindowSpec(chosen.chunk_length, spec.history, spec.image_size, chosen.settings.fps)
            self._factories[dataset] = chosen.source.cursors(window)
        cursor = self._factories[dataset].cursor()
        self._lanes[lane] = dataset, cursor
        self.open_decoders += self._decoders_of(dataset)
        return cursor

    def _decoders_of(self, dataset: int) -> OpenDecoders:
        """Those of one cursor."""
        sizes = self.mixture.datasets[dataset].source.frame_sizes.values()
        return OpenDecoders(len(sizes), sum(reader_bytes(size, self.mixture.spec.image_size) for size in sizes))

    def _finish(self, dataset: Dataset, raw: RawWindow, episode: int, frame: int, pass_index: int) -> Sample:
        spec, dropout = self.mixture.spec, self.mixture.settings.dropout
        group = int(dataset.group_of[episode])
        head = self.mixture.groups[group].norm_head
        number = int(dataset.source.episodes.episode_index[episode])
        key = rng.fold_one(self._keys[dataset.index], number, frame, pass_index)
        state_affine, action_affine = self.mixture.affine[head]

        # Draws have fixed numbers: choice of prompt, drop prompt, drop state, then one a camera of the mixture.
        prompt = raw.prompts[0] if raw.prompts else ""
        if len(raw.prompts) > 1:
            prompt = raw.prompts[int(_draw(key, 0) * len(raw.prompts))]
        images = raw.images
        state = np.zeros(spec.state_dim, np.float32)
        state_affine.normalize(raw.state, out=state[: len(raw.state)])
        state_mask = self._dims(spec.state_dim, len(raw.state))
        if self.train:
            if dropout.prompt and _draw(key, 1) < dropout.prompt:
                prompt = ""
            if dropout.state and _draw(key, 2) < dropout.state:
                state, state_mask = np.zeros_like(state), np.zeros_like(state_mask)
            if dropout.camera:
                number_of = spec.cameras.index
                images = {c: v for c, v in images.items() if _draw(key, 3 + number_of(c)) >= dropout.camera}
        if self.mixture.settings.blank_images:
            images = {c: np.zeros_like(v) for c, v in images.items()}

        steps, dims = raw.actions.shape
        actions = np.zeros((spec.chunk_length, spec.action_dim), np.float32)
        action_affine.normalize(raw.actions, out=actions[:steps, :dims])
        is_pad = raw.is_pad
        if steps < spec.chunk_length:
            is_pad = np.append(is_pad, np.ones(spec.chunk_length - steps, bool))
        return Sample(
            images=images,
            state=state,
            actions=actions,
            state_dim_mask=state_mask,
            action_is_pad=is_pad,
            action_dim_mask=self._dims(spec.action_dim, dims),
            prompt=prompt,
            mode=dataset.settings.mode,
            key=key,
            provenance=Provenance(dataset.index, dataset.repo_id, group, head, number, frame, pass_index),
        )

    def _dims(self, size: int, real: int) -> np.ndarray:
        """[size] bool: the first `real`. The same array each time: nobody writes to a sample's arrays."""
        mask = self._masks.get((size, real))
        if mask is None:
            mask = self._masks[size, real] = np.arange(size) < real
        return mask


def _draw(key: int, number: int) -> float:
    """In [0, 1): a sample's draw of that number."""
    return rng.uniform_at(rng.fold_one(key, _INPUTS), number)
