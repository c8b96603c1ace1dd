"""From a window's address to a sample: the window is read, then transformed. Runs in the loader's workers.

All randomness of a sample is keyed by (seed, dataset, episode, frame, pass), so it depends on no rank, worker or batch.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

from opentau_train import rng
from opentau_train.config.modes import WITH_FUTURE
from opentau_train.data.decode.video import OpenDecoders
from opentau_train.data.fields import Sample
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.source import Cursor, CursorFactory
from opentau_train.data.transforms.base import Record, SampleDraws
from opentau_train.types import Address


class SampleBuilder:
    """Builds samples of a mixture in one process. `training` turns on the transforms that are for training only.

    Cursors are kept per lane: a lane reads forward, so each frame is decoded once.
    """

    def __init__(self, mixture: Mixture, *, training: bool):
        self.mixture = mixture
        self.training = training
        self._keys = [rng.key(mixture.seed, "sample", d.name) for d in mixture.datasets]
        windows = (d.window(mixture.spec) for d in mixture.datasets)
        self._windows = [replace(window, max_pixels=mixture.settings.max_pixels) for window in windows]
        self._decoders = [d.decoders(w) for d, w in zip(mixture.datasets, self._windows, strict=True)]
        self._modes = [tuple(d.settings.modes) for d in mixture.datasets]
        self._bounds = [tuple(accumulate(d.settings.modes.values()))[:-1] for d in mixture.datasets]
        self._factories: dict[int, CursorFactory] = {}
        self._lanes: dict[int, tuple[int, Cursor]] = {}
        self.open_decoders = OpenDecoders()

    def build(self, lane: int, address: Address, *, ahead: int = 0) -> Sample:
        """The sample of the window at `address`, read through `lane`'s cursor. The `ahead` windows that follow it will
        be asked for next, which lets the cursor read them at once.

        Raises `BadSample` for a window that can't be read; the builder stays usable.
        """
        dataset, window = self.mixture.datasets[address.dataset], self._windows[address.dataset]
        number = int(dataset.source.episodes.episode_index[address.episode])
        key = rng.fold_one(self._keys[address.dataset], number, address.frame, address.pass_index)
        place = self._place(address, key)
        mode, group = self._modes[address.dataset][place], int(dataset.group_of[address.episode]) + place
        # A window that is validated in several modes can be read in all of them, or in none.
        future = window.future > 0 and (mode in WITH_FUTURE or not self.training)
        read, where = self._cursor(lane, address.dataset).read, (address.episode, address.frame, ahead)
        raw = read(*where, future=True) if future else read(*where)
        record: Record = {
            **raw.extra,
            "images": raw.images,
            "state": raw.state,
            "actions": raw.actions,
            "action_is_pad": raw.is_pad,
            "prompts": raw.prompts,
            "mode": mode,
            "key": key,
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
        sample = self.mixture.pipelines[address.dataset](record, key, training=self.training)
        return _parted(sample, self.mixture.spec.history + 1, mode in WITH_FUTURE) if future else sample

    def close(self) -> None:
        """Close all files. A later `build` opens them again."""
        for _, cursor in self._lanes.values():
            cursor.close()
        for factory in self._factories.values():
            factory.close()
        self._lanes.clear()
        self._factories.clear()
        self.open_decoders = OpenDecoders()

    def _place(self, address: Address, key: int) -> int:
        """Which of the dataset's modes the sample has."""
        if address.mode >= 0 or not self._bounds[address.dataset]:
            return max(address.mode, 0)
        return bisect_right(self._bounds[address.dataset], SampleDraws(key, "mode").uniform())

    def _cursor(self, lane: int, dataset: int) -> Cursor:
        held = self._lanes.get(lane)
        if held is not None and held[0] == dataset:
            return held[1]
        if held is not None:
            held[1].close()
            self.open_decoders -= self._decoders[held[0]]
        if dataset not in self._factories:
            self._factories[dataset] = self.mixture.datasets[dataset].source.cursors(self._windows[dataset])
        cursor = self._factories[dataset].cursor()
        self._lanes[lane] = dataset, cursor
        self.open_decoders += self._decoders[dataset]
        return cursor


def _parted(sample: Sample, num: int, keeps: bool) -> Sample:
    """The sample with the pictures after the first `num` of a camera as its `future`, if it `keeps` one."""
    images, is_pad = sample["images"].items(), sample["future_is_pad"] | (not keeps)
    future = {camera: frames[num:] for camera, frames in images if keeps and len(frames) > num}
    return {**sample, "images": {c: frames[:num] for c, frames in images}, "future": future, "future_is_pad": is_pad}
