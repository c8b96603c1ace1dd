"""From a window's address to a sample: the window is read, then transformed. Runs in the loader's workers.

All randomness of a sample is keyed by (seed, dataset, episode, frame, pass), so it depends on no rank, worker or batch.
"""

from __future__ import annotations

from opentau_train import rng
from opentau_train.data.batch import Sample
from opentau_train.data.decode.video import OpenDecoders, reader_bytes
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.source import Cursor, CursorFactory
from opentau_train.data.transforms.base import Record
from opentau_train.types import Address, RawWindow, WindowSpec


class SampleBuilder:
    """Builds samples of a mixture in one process. `training` turns on the transforms that are for training only.

    Cursors are kept per lane: a lane reads forward, so each frame is decoded once.
    """

    def __init__(self, mixture: Mixture, *, training: bool):
        self.mixture = mixture
        self.training = training
        self._keys = [rng.key(mixture.seed, "sample", d.name) for d in mixture.datasets]
        self._factories: dict[int, CursorFactory] = {}
        self._lanes: dict[int, tuple[int, Cursor]] = {}
        self.open_decoders = OpenDecoders()

    def build(self, lane: int, address: Address, *, ahead: int = 0) -> Sample:
        """The sample of the window at `address`, read through `lane`'s cursor. The `ahead` windows that follow it will
        be asked for next, which lets the cursor read them at once.

        Raises `BadSample` for a window that can't be read; the builder stays usable.
        """
        raw = self._cursor(lane, address.dataset).read(address.episode, address.frame, ahead)
        record = self._record(raw, address)
        return self.mixture.pipelines[address.dataset](record, record["key"], training=self.training)

    def close(self) -> None:
        """Close all files. A later `build` opens them again."""
        for _, cursor in self._lanes.values():
            cursor.close()
        for factory in self._factories.values():
            factory.close()
        self._lanes.clear()
        self._factories.clear()
        self.open_decoders = OpenDecoders()

    def _record(self, raw: RawWindow, address: Address) -> Record:
        """The window's values, its key, and where it comes from."""
        dataset = self.mixture.datasets[address.dataset]
        group = int(dataset.group_of[address.episode])
        number = int(dataset.source.episodes.episode_index[address.episode])
        return {
            **raw.extra,
            "images": raw.images,
            "state": raw.state,
            "actions": raw.actions,
            "action_is_pad": raw.is_pad,
            "prompts": raw.prompts,
            "mode": dataset.settings.mode,
            "key": rng.fold_one(self._keys[address.dataset], number, address.frame, address.pass_index),
            # Only training weighs samples: held-out losses stay those of the data.
            "weight": raw.extra.get("weight", 1.0) if self.training else 1.0,
            "group": group,
            "dataset_index": address.dataset,
            "dataset_repo_id": dataset.repo_id,
            "norm_head": self.mixture.groups[group].norm_head,
            "episode_index": number,
            "frame_index": address.frame,
            "pass_index": address.pass_index,
        }

    def _cursor(self, lane: int, dataset: int) -> Cursor:
        held = self._lanes.get(lane)
        if held is not None and held[0] == dataset:
            return held[1]
        if held is not None:
            held[1].close()
            self.open_decoders -= self._decoders_of(held[0])
        if dataset not in self._factories:
            chosen = self.mixture.datasets[dataset]
            history, size = self.mixture.spec.history, self._picture_size(dataset)
            window = WindowSpec(chosen.chunk_length, history, size, chosen.settings.fps, chosen.between)
            self._factories[dataset] = chosen.source.cursors(window)
        cursor = self._factories[dataset].cursor()
        self._lanes[lane] = dataset, cursor
        self.open_decoders += self._decoders_of(dataset)
        return cursor

    def _decoders_of(self, dataset: int) -> OpenDecoders:
        """The decoders that one cursor of the dataset keeps open."""
        sizes, read_at = self.mixture.datasets[dataset].source.frame_sizes.values(), self._picture_size(dataset)
        return OpenDecoders(len(sizes), sum(reader_bytes(size, read_at) for size in sizes))

    def _picture_size(self, dataset: int) -> tuple[int, int]:
        """(H, W) inside which the dataset's pictures are read: more than the batch's where they are cropped."""
        return self.mixture.pipelines[dataset].picture_size(self.mixture.spec.image_size)
