"""What the order costs to decode and how correlated its batches are: computed from the plan, for every GOP and batch.

    python benchmarks/lanes.py [--measure] [--speed]

Frames decoded for one used over one epoch of one camera, at the default lanes and in one process, and the predicted
variance inflation, of this version of the order and of the one before, which knew no keyframes. A reader decodes
from the keyframe on where it doesn't go on. With `--measure` the program's own readers read the smaller cases (tiny
pictures, h264 and AV1), and their counts stand beside the computed ones. With `--speed` whole epochs of 20 episodes
with natural pictures are read in both orders and, in turns with them, decoded and scaled file by file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
from stream_speed import decode, open_stream, scaling, take
from support.datasets import Repeated, write_dataset
from support.program import mixture_of

from opentau_train.config.data import CorrelationSettings
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.order.quality import ShuffleQuality
from opentau_train.data.order.tape import VERSION, Tape
from opentau_train.types import Address

CASES = [(20, 200, 32), (20, 200, 256), (1000, 300, 256), (1000, 300, 1024)]
"""Episodes, frames of each, batch."""
GOPS = (2, 15, 30, 250)
BEFORE = 2
"""The version that knew no keyframes."""
CODECS = {
    "libx264": {"preset": "ultrafast", "crf": "30", "bf": "0", "threads": "1", "sc_threshold": "0"},
    "libsvtav1": {"preset": "12", "crf": "40", "svtav1-params": "lp=1"},
}


def episodes(num: int, length: int, gop: int) -> DatasetBlocks:
    """`num` episodes of `length` frames, each with a keyframe every `gop` from its first on."""
    place, frame = np.arange(num, dtype=np.int32), np.arange(0, length, gop, dtype=np.int32)
    zero = np.zeros(num, np.int32)
    blocks = DatasetBlocks("d", place, zero, zero + length, place.astype(np.int64))
    return blocks.entered_at((place.astype(np.int64) + 1) * len(frame), np.tile(frame, num), reach=0)


def decoded(tape: Tape, gop: int) -> tuple[float, int]:
    """(frames decoded for one used over the first epoch, readers)."""
    windows = tape.windows(np.arange(tape.epoch_size))
    order = np.lexsort((windows.t, windows.slot))
    slot, episode, frame = windows.slot[order], windows.episode[order], windows.frame[order]
    step = np.diff(frame, prepend=-1)
    goes_on = (np.diff(slot, prepend=-1) == 0) & (np.diff(episode, prepend=-1) == 0) & (step == 1)
    return float(np.where(goes_on, 1, frame % gop + 1).sum() / tape.epoch_size), len(np.unique(slot))


def row(num: int, length: int, batch: int, gop: int) -> list[str]:
    blocks = episodes(num, length, gop)
    cells = [f"{num} x {length}", str(batch), str(gop)]
    for version in (BEFORE, VERSION):
        tape = Tape([blocks], [blocks.num_windows], seed=42, batch_size=batch, version=version)
        quality = ShuffleQuality(tape, CorrelationSettings())
        steps = np.unique(np.linspace(0, tape.epoch_size // batch - 1, 24).astype(int)).tolist()
        vif = np.mean([quality.of_batch(tape.batch(step)) for step in steps])
        momentum = np.mean([quality.of_momentum(step) for step in steps[len(steps) // 3 :]])
        cost, readers = decoded(tape, gop)
        cells += [f"{cost:.3f}", f"{vif:.2f}", f"{momentum:.2f}", str(readers)]
    return cells


def measure(folder: Path) -> None:
    """Print what the readers themselves count."""
    print("\n| codec | B | GOP | version | computed | counted |\n|---|---|---|---|---|---|")
    tiny = [np.full((64, 64, 3), 3 * i, np.uint8) for i in range(60)]
    for codec, options in CODECS.items():
        for gop in GOPS:
            root = folder / f"{codec}{gop}"
            pictures = Repeated(tiny, 200)
            write_dataset(root, [200] * 20, size=(64, 64), cameras=1, codec=codec, gop=gop, options=options,
                          episodes_per_file=1, frames=pictures)  # fmt: skip
            mixture = mixture_of(root, "data.num_workers=0", "data.image_size=[32,32]")
            for batch, version in ((32, BEFORE), (32, VERSION), (256, BEFORE), (256, VERSION)):
                tape = mixture.tape(batch, version)
                cells = [codec, str(batch), str(gop), str(version), f"{decoded(tape, gop)[0]:.3f}"]
                print(f"| {' | '.join([*cells, f'{counted(mixture, tape):.3f}'])} |", flush=True)


def counted(mixture: Mixture, tape: Tape) -> float:
    """Frames that the program's readers decode for one used, over the first epoch."""
    windows, builder = tape.windows(np.arange(tape.epoch_size)), SampleBuilder(mixture, training=True)
    columns = windows.slot, windows.ahead, windows.dataset, windows.episode, windows.frame, windows.pass_index
    for slot, ahead, *address in zip(*(column.tolist() for column in columns), strict=True):
        builder.build(slot, Address(*address), ahead=ahead)
    (factory,) = builder.factories.values()
    builder.close()
    return factory.frames_decoded / tape.epoch_size


def speed(folder: Path, repeats: int, batch: int = 32) -> None:
    """Print CPU milliseconds a window (a picture of each camera, rows, normalisation, batches) over whole epochs."""
    head = "| cameras | GOP | decode and scale | version 2 | version 3 | over decode and scale: 2 | 3 |"
    print(f"\n{head}\n|---|---|---|---|---|---|---|")
    for cameras, gop in product((1, 2), GOPS):
        root = write_dataset(folder / f"{cameras}_{gop}", [200] * 20, cameras=cameras, gop=gop, episodes_per_file=1)
        mixture, files = mixture_of(root, "data.num_workers=0"), sorted(root.rglob("*.mp4"))
        times: dict[str, list[float]] = {"scaled": [], "2": [], "3": []}
        for _ in range(repeats):
            frames = decode(files, scaling(mixture.spec.image_size)) / 2  # it counts two cameras
            times["scaled"].append(cameras * frames)
            for version in (BEFORE, VERSION):
                tape = mixture.tape(batch, version)
                stream, _ = open_stream(mixture, tape)
                times[str(version)].append(take(stream, tape.epoch_size // batch))
        scaled, before, now = (statistics.median(found) for found in times.values())
        cells = [*(f"{found:.3f}" for found in (scaled, before, now)), f"{before / scaled:.2f}", f"{now / scaled:.2f}"]
        print(f"| {' | '.join([str(cameras), str(gop), *cells])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="also count what the readers decode")
    parser.add_argument("--speed", action="store_true", help="also measure whole epochs with natural pictures")
    parser.add_argument("--repeats", type=int, default=5, help="turns of --speed (5)")
    options = parser.parse_args()
    columns = ["decoded", "VIF", "over momentum", "readers"]
    head = ["episodes", "B", "GOP", *(f"version {v}: {c}" for v in (BEFORE, VERSION) for c in columns)]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for case in CASES:
        for gop in GOPS:
            print(f"| {' | '.join(row(*case, gop))} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.measure:
            measure(Path(folder))
        if options.speed:
            speed(Path(folder), options.repeats)


if __name__ == "__main__":
    main()
