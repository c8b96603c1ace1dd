"""The sheet of what the policy sees: a block for each sample, a row for each camera; on the left the frames of its
window as validation sees them, oldest first and the future's last, on the right as training does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from opentau_train.data.batch import Batch, stack
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.mixture import Dataset, Mixture
from opentau_train.data.transforms.base import Transform
from opentau_train.data.transforms.drop import BlankImages, DropInputs
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.data.transforms.shape import ChoosePrompt
from opentau_train.errors import BadSample, UserError
from opentau_train.types import Address

WIDTH = 192
"""Pixels that a frame is enlarged to, at least."""
GAP, LINE = 8, 14
COLOUR = (255, 255, 255)


def pipeline_of(dataset: Dataset, mixture: Mixture) -> Pipeline:
    """The dataset's transforms as far as pictures and prompts go: none needs statistics, so no rows are read."""
    dropout = mixture.settings.dropout
    shared: dict[str, Transform] = {"choose_prompt": ChoosePrompt()}
    shared["drop_inputs"] = DropInputs(prompt=dropout.prompt, camera=dropout.camera)
    if mixture.settings.blank_images:
        shared["blank_images"] = BlankImages()
    return Pipeline({**dataset.transforms, **shared})


def samples(mixture: Mixture, batch_size: int, num: int) -> Iterator[tuple[str, Batch]]:
    """(where it comes from, the sample as validation sees it and as training does) of those of the run's first `num`
    samples that can be read; the others are told on stderr."""
    mixture = replace(mixture, pipelines=tuple(pipeline_of(d, mixture) for d in mixture.datasets))
    windows = mixture.tape(batch_size).windows(np.arange(num))
    sees = SampleBuilder(mixture, training=False), SampleBuilder(mixture, training=True)
    with closing(sees[0]), closing(sees[1]):
        for row in range(num):
            columns = (windows.dataset, windows.episode, windows.frame, windows.pass_index)
            address = Address(*(int(column[row]) for column in columns))
            try:
                both = [builder.build(0, address) for builder in sees]
            except BadSample as error:
                print(f"{row}: {error}", file=sys.stderr)
                continue
            name = mixture.datasets[address.dataset].name
            where = f"{name}, episode {both[0]['episode_index']}, frame {address.frame}"
            shown = ("images", "future", "prompt", "mode", "weight")
            yield where, stack([{k: sample[k] for k in shown if k in sample} for sample in both], mixture.spec)


def sheet(mixture: Mixture, batch_size: int, num: int) -> Image.Image:
    """The picture of `num` samples, one below another. Raises as `blocks` does."""
    return Image.fromarray(np.concatenate(blocks(mixture, batch_size, num)))


def blocks(mixture: Mixture, batch_size: int, num: int) -> list[NDArray[np.uint8]]:
    """[H, W, 3] a picture of each of `num` samples. Raises `UserError` where the data have no cameras or none of the
    samples can be read."""
    if not mixture.spec.cameras:
        raise UserError("the data have no cameras", where="data.sources", remedy="name some: data.sources.NAME.cameras")
    made = [block(*sample) for sample in samples(mixture, batch_size, num)]
    if not made:
        raise UserError("none of the samples can be read", where="data.sources", remedy="see above what each lacks")
    return made


def block(where: str, both: Batch) -> NDArray[np.uint8]:
    """[H, W, 3]: the rows of a sample's cameras under their captions."""
    rows = []
    future = both.values.get("future", {})
    none = next(iter(future.values()), both.weight)
    for camera, frames in both.images.items():
        later = [future.get(camera, torch.zeros_like(none))] if future else []
        pixels = torch.cat([frames, *later], dim=1).movedim(2, -1).numpy()  # [2, h+1+F, H, W, 3]
        zoom = -(-WIDTH // pixels.shape[3])
        sides = [np.concatenate(list(side), axis=1).repeat(zoom, 0).repeat(zoom, 1) for side in pixels]
        gap = np.full((sides[0].shape[0], GAP, 3), 96, np.uint8)
        seen = [camera if there else f"{camera}: none" for there in both.camera_mask[camera].tolist()]
        texts = f"{seen[0]}, as validation sees it", f"{seen[1]}, as training does"
        row = np.concatenate([sides[0], gap, sides[1]], axis=1)
        rows += [caption(row.shape[1], {0: texts[0], sides[0].shape[1] + GAP: texts[1]}), row]
    prompts = [f'"{prompt}"' if prompt else "no prompt" for prompt in both.prompt]
    lines = [
        f"{where}, mode {both.mode[0]}" if future else where,
        prompts[0] if prompts[0] == prompts[1] else f"{prompts[0]}; in training {prompts[1]}",
    ]
    return np.concatenate([*rows, *(caption(rows[0].shape[1], {0: line}) for line in lines), rows[0][:GAP] * 0])


def caption(width: int, texts: dict[int, str]) -> NDArray[np.uint8]:
    """[LINE, width, 3]: each text from its place on, on black."""
    picture = Image.new("RGB", (width, LINE))
    for left, text in texts.items():
        ImageDraw.Draw(picture).text((left + 3, 1), text, fill=COLOUR)
    return np.array(picture)
