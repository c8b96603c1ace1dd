"""From a window's address to a sample: the window is read, then transformed. Runs in the loader's workers.

All randomness of a sample is keyed by (seed, dataset, episode, frame, pass), so it depends on no rank, worker or batch.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

from opentau_train import rng
from opentau_train.config.modes import WITH_FUTURE
from opentau_train.data.batch import Sample
from opentau_train.data.decode.video import OpenDecoders
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.source import Cursor, CursorFactory
from opentau_train.data.transforms.base import Record, SampleDraws
from opentau_train.types import Address, RawWindow


class SampleBuilder:
    """Builds samples of a mixture in one process. `training` turns on the transforms that are for training only.

    Cursors are kept per lane: a lane reads forward, so each frame is decoded once.
    """

    def __init__(self, mixture: Mixture, *, training: bool):
        self.mixture = mixture
        self.training = training
        self._keys = [rng.key(mixture.seed, "sample", d.name) for d in mixture.datasets]
        self._windows = mixture.windows
        self._decoders = [d.decoders(w) for d, w in zip(mixture.datasets, self._windows, strict=True)]
        self._modes = [tuple(d.settings.modes) for d in mixture.datasets]
        self._bounds = [tuple(accumulate(d.settings.modes.values()))[:-1] for d in mixture.datasets]
        self._last: tuple[tuple[int, ...], RawWindow] | None = None
        self._factories: dict[int, CursorFactory] = {}
        self._lanes: dict[int, tuple[int, Cursor]] = {}
        self.open_decoders = OpenDecoders()

    def build(self, lane: int, address: Address, *, ahead: int = 0) -> Sample:
        """The sample of the window at `address`, read through `lane`'s cursor. The `ahead` windows that follow it will
        be asked for next, which lets the cursor read them at once.

        Raises `BadSample` for a window that can't be read; the builder stays usable.
        """
        dataset = self.mixture.datasets[address.dataset]
        number = int(dataset.source.episodes.episode_index[address.episode])
        key = rng.fold_one(self._keys[address.dataset], number, address.frame, address.pass_index)
        place = self._mode(address, key)
        mode, group = self._modes[address.dataset][place], int(dataset.group_of[address.episode])
        with_future = mode in WITH_FUTURE and self._windows[address.dataset].future > 0
        record = self._record(self._read(lane, address, ahead, with_future), address)
        record |= {"mode": mode, "key": key, "episode_index": number, "norm_head": self.mixture.groups[group].norm_head}
        record["group"] = group + place
        sample = self.mixture.pipelines[address.dataset](record, key, training=self.training)
        if not with_future:
            return sample
        images, num = sample["images"], self.mixture.spec.history + 1
        later = {camera: frames[num:] for camera, frames in images.items() if len(frames) > num}
        return {**sample, "images": {camera: frames[:num] for camera, frames in images.items()}, "future": later}

    def close(self) -> None:
        """Close all files. A later `build` opens them again."""
        for _, cursor in self._lanes.values():
            cursor.close()
        for factory in self._factories.values():
            factory.close()
        self._lanes.clear()
        self._factories.clear()
        self._last = None
        self.open_decoders = OpenDecoders()

    def _mode(self, address: Address, key: int) -> int:
        """Which of the dataset's modes the sample has."""
        bounds = self._bounds[address.dataset]
        if address.mode >= 0 or not bounds:
            return max(address.mode, 0)
        return bisect_right(bounds, SampleDraws(key, "mode").uniform())

    def _read(self, lane: int, address: Address, ahead: int, with_future: bool) -> RawWindow:
        """The window at `address`. One that is validated in several modes is read once for all of them."""
        place = lane, *address[:-1]
        several = not self.training and len(self._modes[address.dataset]) > 1
        if several and self._last is not None and self._last[0] == place:
            raw = self._last[1]
        else:
            read, where = self._cursor(lane, address.dataset).read, (address.episode, address.frame, ahead)
            needs = with_future or (several and self._windows[address.dataset].future > 0)
            raw = read(*where, future=True) if needs else read(*where)
            self._last = (place, raw) if several else None
        if with_future or raw.future_is_pad is None:
            return raw
        images = {camera: frames[: self.mixture.spec.history + 1] for camera, frames in raw.images.items()}
        return replace(raw, images=images, future_is_pad=None)

    def _record(self, raw: RawWindow, address: Address) -> Record:
        """The window's values, and where it comes from."""
        return {
            **raw.extra,
            "images": raw.images,
            "state": raw.state,
            "actions": raw.actions,
            "action_is_pad": raw.is_pad,
            "prompts": raw.prompts,
            # Only training weighs samples: held-out losses stay those of the data.
            **({} if raw.future_is_pad is None else {"future_is_pad": raw.future_is_pad}),
            "weight": raw.extra.get("weight", 1.0) if self.training else 1.0,
            "dataset_index": address.dataset,
            "dataset_repo_id": self.mixture.datasets[address.dataset].repo_id,
            "frame_index": address.frame,
            "pass_index": address.pass_index,
        }

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
