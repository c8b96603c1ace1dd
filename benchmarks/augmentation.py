"""What augmented pictures cost: on CPU in the loader's workers, with OpenCV and with Pillow, or on the device.

    python benchmarks/augmentation.py [--device cuda] [--repeats 5] [--sides opencv pillow batched] [--no-windows]

Two tables, medians of interleaved turns; one thread, but for a device that isn't the CPU:

- milliseconds a picture of each preset, the same numbers drawn for all sides: `opencv`, the program's own, and
  `pillow`, picture by picture in one process (CPU time); `batched`, one pass of torch over a batch of 64 pictures that
  lie on the device already, colours always in one order (wall clock on a card, CPU time on the CPU). `apart`: the mean
  difference between the pictures of the first and the last, in levels of 255;
- CPU milliseconds a window of the stream with each preset: reading, augmentation, rows, batches. `crop` is the crop of
  droid_cosmos alone, and what it costs to read pictures larger for it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from stream_speed import BATCH, LANES_PER_SAMPLE, open_stream, print_head, take, warm_up, with_episodes
from support.datasets import H264, natural, write_dataset
from support.program import machine, mixture_of, settings_of
from torch.nn import functional

from opentau_train.config.typed import instantiate
from opentau_train.data.decode.fit import fit
from opentau_train.data.transforms.augment.pictures import Augment, Drawn
from opentau_train.data.transforms.base import SampleDraws

PRESETS = ("droid_cosmos", "openpi", "lerobot")
STORED, SIZES = (180, 320), ((96, 96), (224, 224))
NUM = 64
SIDES = ("opencv", "pillow", "batched")
GREY = (0.299, 0.587, 0.114)
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of the batched pass (cpu)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="of the first table (all)")
    parser.add_argument("--windows", action=argparse.BooleanOptionalAction, default=True, help="the second table too")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"{machine().replace('no accelerator', name)}; one thread, medians of {options.repeats}\n")
    print_head("preset", "read at", "pictures", *options.sides, *["apart"] * ("opencv" in options.sides))
    for preset, size in itertools.product(PRESETS, SIZES):
        print_pictures(augment_of(preset, size), preset, device, options)
    if options.windows:
        print()
        with tempfile.TemporaryDirectory() as folder:
            print_windows(Path(folder), options.repeats)


def print_pictures(augment: Augment, preset: str, device: torch.device, options: argparse.Namespace) -> None:
    """The first table's row of a preset."""
    read_at = fit(*STORED, augment.picture_size(augment.size))
    pictures = np.stack([np.asarray(Image.fromarray(p).resize(read_at[::-1])) for p in natural(NUM, STORED, seed=0)])
    drawn = [augment.draw("eye", SampleDraws(key, "augment")) for key in range(NUM)]
    out = fit(*read_at, augment.size)
    on_device = torch.from_numpy(pictures).to(device)
    sides: dict[str, Callable[[], object]] = {
        "opencv": lambda: [augment.apply(p[None], d) for p, d in zip(pictures, drawn, strict=True)],
        "pillow": lambda: [with_pillow(p, d, out) for p, d in zip(pictures, drawn, strict=True)],
        "batched": lambda: batched(on_device, drawn, out),
    }
    times: dict[str, list[float]] = {side: [] for side in options.sides}
    for turn in range(options.repeats + 1):
        for side in options.sides:
            spent = timed(sides[side], device if side == "batched" else torch.device("cpu"))
            if turn:  # the first one warms up
                times[side].append(1e3 * spent / NUM)
    cells = [preset, "x".join(map(str, read_at)), "x".join(map(str, out))]
    cells += [f"{statistics.median(of_side):.3f}" for of_side in times.values()]
    if "opencv" in times:
        ours = np.concatenate([augment.apply(p[None], d) for p, d in zip(pictures, drawn, strict=True)])
        cells.append(f"{np.abs(batched(on_device, drawn, out).cpu().numpy().astype(float) - ours).mean():.1f}")
    print(f"| {' | '.join(cells)} |", flush=True)


def augment_of(preset: str, size: tuple[int, int]) -> Augment:
    words = ["+recipe=lerobot", "data.sources.main.root=.", f"data/augment={preset}"]
    tree = settings_of([*words, f"data.image_size=[{size[0]},{size[1]}]"]).data.transforms["augment"]
    return instantiate(tree, "data.transforms.augment")


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of CPU time, or by the clock where the work is done by a card."""
    if device.type == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def matrix_of(drawn: Drawn, read_at: tuple[int, int], out: tuple[int, int]) -> NDArray[np.float64]:
    """[2, 3]: from a place in the result to one in the picture, in pixels, both counted from the upper left corner."""
    rows, columns = drawn.box.pixels(*read_at)
    angle = np.deg2rad(drawn.degrees)
    scale = np.diag([(columns.stop - columns.start) / out[1], (rows.stop - rows.start) / out[0]])
    linear = scale @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array([out[1] * (0.5 + drawn.shift[0]), out[0] * (0.5 + drawn.shift[1])])
    source = np.array([columns.start + columns.stop, rows.start + rows.stop]) / 2
    return np.column_stack([linear, source - linear @ middle])


def with_pillow(picture: NDArray[np.uint8], drawn: Drawn, out: tuple[int, int]) -> NDArray[np.uint8]:
    matrix = matrix_of(drawn, picture.shape[:2], out).ravel().tolist()
    image = Image.fromarray(picture)
    image = image.transform(out[::-1], Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    for name, number in drawn.operations:
        if name == "hue":
            hue, saturation, value = image.convert("HSV").split()
            hue = hue.point([(i + round(number * 256)) % 256 for i in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        else:
            image = ENHANCERS[name](image).enhance(number)
    return np.asarray(image)


def batched(pictures: torch.Tensor, drawn: Sequence[Drawn], out: tuple[int, int]) -> torch.Tensor:
    """[B, H, W, 3] uint8 of pictures [B, H', W', 3] uint8, all in one pass on their device."""
    read_at = pictures.shape[1], pictures.shape[2]
    pixels = np.stack([matrix_of(d, read_at, out) for d in drawn])
    unit_out = np.array([[out[1] / 2, 0, out[1] / 2], [0, out[0] / 2, out[0] / 2], [0, 0, 1]])
    unit_in = np.array([[2 / read_at[1], 0, -1], [0, 2 / read_at[0], -1]])
    whole = np.concatenate([pixels, np.broadcast_to([[[0.0, 0.0, 1.0]]], (len(drawn), 1, 3))], axis=1)
    theta = torch.from_numpy((unit_in @ whole @ unit_out).astype(np.float32)).to(pictures.device)
    floats = pictures.permute(0, 3, 1, 2).float() / 255
    grid = functional.affine_grid(theta, [len(drawn), 3, *out], align_corners=False)
    floats = functional.grid_sample(floats, grid, align_corners=False)
    used = {name for d in drawn for name, _ in d.operations}
    for name, operation in OPERATIONS.items():
        if name in used:
            neutral = 0.0 if name == "hue" else 1.0
            numbers = [dict(d.operations).get(name, neutral) for d in drawn]
            floats = operation(floats, torch.tensor(numbers, device=floats.device)[:, None, None, None]).clamp(0, 1)
    return (floats * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def grey(p: torch.Tensor) -> torch.Tensor:
    return (p * torch.tensor(GREY, device=p.device)[:, None, None]).sum(1, keepdim=True)


def hue(p: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    most, which = p.max(1, keepdim=True)
    spread = most - p.min(1, keepdim=True).values
    safe = torch.where(spread == 0, 1, spread)
    r, g, b = p.split(1, 1)
    sixth = torch.cat([(g - b) / safe % 6, (b - r) / safe + 2, (r - g) / safe + 4], 1).gather(1, which)
    sixth = (torch.where(spread == 0, 0, sixth) + 6 * turns) % 6
    across = torch.cat([(n + sixth) % 6 for n in (5.0, 3.0, 1.0)], 1)
    return most - spread * torch.minimum(across, 4 - across).clamp(0, 1)


def sharpness(p: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=p.device) / 13
    smooth = p.clone()
    smooth[..., 1:-1, 1:-1] = functional.conv2d(p, kernel.expand(3, 1, 3, 3), groups=3)
    return torch.lerp(smooth, p, factor)


OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "brightness": lambda p, factor: p * factor,
    "contrast": lambda p, factor: torch.lerp(grey(p).mean((1, 2, 3), keepdim=True).expand_as(p), p, factor),
    "saturation": lambda p, factor: torch.lerp(grey(p).expand_as(p), p, factor),
    "hue": hue,
    "sharpness": sharpness,
}


def print_windows(folder: Path, repeats: int, lengths: Sequence[int] = (160,) * 12) -> None:
    """The second table: two cameras of `STORED`, h264 with a keyframe every 2 frames."""
    root = folder / "data"
    write_dataset(root, list(lengths), size=STORED, codec="libx264", gop=2, options=H264)
    colours = ("brightness", "contrast", "saturation", "hue")
    crop = ["data/augment=droid_cosmos", *(f"data.transforms.augment.{colour}=null" for colour in colours)]
    sides = {"none": ["data/augment=none"], "crop": crop, **{p: [f"data/augment={p}"] for p in PRESETS}}
    print_head("pictures", *sides)
    for height, width in SIZES:
        streams = {}
        for side, words in sides.items():
            shape = [f"data.image_size=[{height},{width}]", "data.num_workers=0"]
            mixture = with_episodes(mixture_of(root, f"data.lanes_per_sample={LANES_PER_SAMPLE}", *words, *shape), 96)
            streams[side] = open_stream(mixture, mixture.tape(BATCH))[0]
            warm_up(streams[side])
        times: dict[str, list[float]] = {side: [] for side in streams}
        for _ in range(repeats):
            for side, stream in streams.items():
                times[side].append(take(stream, 6))
        cells = [f"{height}x{width}", *(f"{statistics.median(of_side):.3f}" for of_side in times.values())]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
