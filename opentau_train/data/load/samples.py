"""From a window's address to a sample: the window is read, then transformed. Runs in the loader's workers.

All randomness of a sample is keyed by (seed, dataset, episode, frame, pass), so it depends on no rank, worker or batch.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

from opentau_train import rng
from opentau_train.config.modes import WITH_FUTURE
from opentau_train.data.decode.decoding import Decoding
from opentau_train.data.decode.video import OpenDecoders
from opentau_train.data.fields import Sample
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.source import Cursor, CursorFactory
from opentau_train.data.transforms.base import Record, SampleDraws
from opentau_train.types import Address

IDLE = 16
"""A lane is over when the others have been used so often since; each is used a few times in a batch."""


class SampleBuilder:
    """Builds samples of a mixture in one process. `training` turns on the transforms that are for training only.

    Cursors are kept per lane: a lane reads forward, so each frame is decoded once.
    """

    def __init__(self, mixture: Mixture, *, training: bool):
        self.mixture = mixture
        self.training = training
        self.keys = [rng.key(mixture.seed, "sample", d.name) for d in mixture.datasets]
        data = mixture.settings
        decoding = Decoding(data.max_pixels, data.skip_loop_filter, data.video_decoder)
        self._windows = [replace(d.window(mixture.spec), decoding=decoding) for d in mixture.datasets]
        self._decoders = [d.decoders(w) for d, w in zip(mixture.datasets, self._windows, strict=True)]
        self._modes = [tuple(d.settings.modes) for d in mixture.datasets]
        self._bounds = [tuple(accumulate(d.settings.modes.values()))[:-1] for d in mixture.datasets]
        self.factories: dict[int, CursorFactory] = {}
        self._lanes: dict[int, tuple[int, Cursor, int]] = {}  # dataset, cursor, number of the use that was the last
        self.open_decoders, self._used = OpenDecoders(), 0

    def build(self, lane: int, address: Address, *, ahead: int = 0) -> Sample:
        """The sample of the window at `address`, read through `lane`'s cursor. The `ahead` windows that follow it will
        be asked for next, which lets the cursor read them at once.

        Raises `BadSample` for a window that can't be read; the builder stays usable.
        """
        d, dataset = address.dataset, self.mixture.datasets[address.dataset]
        number = int(dataset.source.episodes.episode_index[address.episode])
        key = rng.fold_one(self.keys[d], number, address.frame, address.pass_index)
        place = address.mode if address.mode >= 0 else self.place(d, key)
        mode, group = self._modes[d][place], int(dataset.group_of[address.episode]) + place
        # A window that is validated in several modes can be read in all of them, or in none.
        future = self._windows[d].future > 0 and (mode in WITH_FUTURE or not self.training)
        read, where = self.cursor(lane, d).read, (address.episode, address.frame, ahead)
        raw = read(*where, future=True) if future else read(*where)
        values = {"state": raw.state, "actions": raw.actions, "action_is_pad": raw.is_pad, "prompts": raw.prompts}
        record = self.record({**raw.extra, "images": raw.images, **values}, d, place, group)
        record |= {"key": key, "episode_index": number, "frame_index": address.frame, "pass_index": address.pass_index}
        sample = self.mixture.pipelines[d](record, key, training=self.training)
        return _parted(sample, self.mixture.spec.history + 1, mode in WITH_FUTURE) if future else sample

    def record(self, values: Record, d: int, place: int, group: int) -> Record:
        """What is read of a window of dataset `d`, or of several, with what they are: the mode at `place`, `group`."""
        return {
            **values,
            "mode": self._modes[d][place],
            # Only training weighs samples: held-out losses stay those of the data.
            "weight": values.get("weight", 1.0) if self.training else 1.0,
            "group": group,
            "dataset_index": d,
            "dataset_repo_id": self.mixture.datasets[d].repo_id,
            "norm_head": self.mixture.groups[group].norm_head,
        }

    def close(self) -> None:
        """Close all files. A later `build` opens them again."""
        for _, cursor, _ in self._lanes.values():
            cursor.close()
        for factory in self.factories.values():
            factory.close()
        self._lanes.clear()
        self.factories.clear()
        self.open_decoders = OpenDecoders()

    def place(self, d: int, key: int) -> int:
        """Which of the modes of dataset `d` the sample has, where it is drawn."""
        bounds = self._bounds[d]
        return bisect_right(bounds, SampleDraws(key, "mode").uniform()) if bounds else 0

    def cursor(self, lane: int, dataset: int) -> Cursor:
        """The lane's cursor, a new one where it comes from another dataset. Lanes that a phase had and the next one
        hasn't are closed then: they would add up."""
        self._used += 1
        if lane not in self._lanes or self._lanes[lane][0] != dataset:
            for other, (held, cursor, at) in list(self._lanes.items()):
                if other == lane or self._used - at > IDLE * len(self._lanes):
                    cursor.close()
                    self.open_decoders -= self._decoders[held]
                    del self._lanes[other]
            if dataset not in self.factories:
                self.factories[dataset] = self.mixture.datasets[dataset].source.cursors(self._windows[dataset])
            self._lanes[lane] = dataset, self.factories[dataset].cursor(), 0
            self.open_decoders += self._decoders[dataset]
        cursor = self._lanes[lane][1]
        self._lanes[lane] = dataset, cursor, self._used
        return cursor


def _parted(sample: Sample, num: int, keeps: bool) -> Sample:
    """The sample with the pictures after the first `num` of a camera as its `future`, if it `keeps` one."""
    images, is_pad = sample["images"].items(), sample["future_is_pad"] | (not keeps)
    future = {camera: frames[num:] for camera, frames in images if keeps and len(frames) > num}
    return {**sample, "images": {c: frames[:num] for c, frames in images}, "future": future, "future_is_pad": is_pad}
