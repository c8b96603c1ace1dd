"""What a window of the stream costs: CPU against a bare decode and a random-access loader, and the plan itself.

    python benchmarks/stream_speed.py [--repeats 5]

Writes datasets of 2 cameras with grain (h264 with a keyframe every 2 and every 30 frames, AV1 every 2), reads them in
one process and one thread. All sides read the same files in turns; CPU seconds, medians. `decode` decodes every
file in order and throws the frames away; `decode, scale` also brings them to the stream's 96x96 RGB; `random` is a
loader that seeks for every window (files stay open); `stream` is the program's own: 64 lanes, rows, images, batches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from support.datasets import AV1, H264, write_dataset
from support.program import machine, mixture_of

from opentau_train.data.images import Letterbox
from opentau_train.data.mixture import Mixture
from opentau_train.data.samples import SampleBuilder
from opentau_train.data.stream import Parts, TrainPlan
from opentau_train.data.tape import DatasetBlocks, Tape

SMALL, LARGE = (180, 320), (480, 640)
VARIANTS = {
    "h264 180x320, GOP 2": ("libx264", 2, H264, SMALL),
    "h264 180x320, GOP 30": ("libx264", 30, H264, SMALL),
    "AV1 180x320, GOP 2": ("libsvtav1", 2, AV1, SMALL),
    "h264 480x640, GOP 30": ("libx264", 30, H264, LARGE),
}
LENGTHS = [160] * 12
BATCH, LANES_PER_SAMPLE = 32, 2
STEPS = 10
"""Batches of the stream a turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path, help="keep the datasets there, and use them again")
    options = parser.parse_args()
    repeats = options.repeats
    print(f"{machine()}; one thread, medians of {repeats}\n")
    print("| video | decode | decode, scale | stream | random | stream/decode | stream/scaled | random/stream | "
          "decoded a frame used |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (codec, gop, tuning, size)) in enumerate(VARIANTS.items()):
            root = (options.data or Path(folder)) / f"speed{number}"
            write_dataset(root, LENGTHS, size=size, codec=codec, gop=gop, options=tuning)
            print_variant(name, root, repeats)
    print_plan()


def print_variant(name: str, root: Path, repeats: int) -> None:
    mixture = mixture_of(root, f"data.lanes_per_sample={LANES_PER_SAMPLE}", "data.num_workers=0")
    files = sorted(root.rglob("*.mp4"))
    stream, builder = open_stream(mixture)
    warm_up(stream)
    before, seen = builder[0].frames_decoded, 0
    sides: dict[str, Callable[[], float]] = {
        "decode": lambda: decode(files[:4], None),
        "scaled": lambda: decode(files[:4], Letterbox(mixture.spec.image_size)),
        "stream": lambda: take(stream, STEPS),
        "random": lambda: random_access(mixture, 48),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            times[side].append(run())
            seen += STEPS * BATCH * (side == "stream")
    decoded = (builder[0].frames_decoded - before) / (2 * seen)
    m = {side: statistics.median(found) for side, found in times.items()}
    cells = [f"{m[s]:.3f} ms" for s in ("decode", "scaled", "stream", "random")]
    ratios = [f"{m['stream'] / m['decode']:.2f}", f"{m['stream'] / m['scaled']:.2f}"]
    ratios.append(f"{m['random'] / m['stream']:.1f}")
    print(f"| {name} | {' | '.join([*cells, *ratios])} | {decoded:.3f} |", flush=True)


def open_stream(mixture: Mixture) -> tuple[Iterator, list]:
    """The training stream in this process, and the list that its reader will be in."""
    tape = mixture.tape(BATCH)
    readers: list = []
    source = mixture.datasets[0].source
    cursors = source.cursors

    def noted(window):
        readers.append(cursors(window))
        return readers[-1]

    object.__setattr__(source, "cursors", noted)
    return iter(Parts(mixture, TrainPlan(tape, 0, 1, 0, 10**6), train=True)), readers


def warm_up(stream: Iterator) -> None:
    """Open every lane, a few rows deep: what a start costs is the business of first_batch.py."""
    for _ in range(LANES_PER_SAMPLE * 5):
        next(stream)


def take(stream: Iterator, steps: int) -> float:
    """CPU milliseconds a window over the next `steps` batches."""
    started = time.process_time()
    windows = sum(len(next(stream).t) for _ in range(steps))
    return 1e3 * (time.process_time() - started) / windows


def decode(files: list[Path], scale: Letterbox | None) -> float:
    """CPU milliseconds for as many frames as a window has (one a camera), read in order."""
    started, frames = time.process_time(), 0
    for path in files:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_count = 1
            for frame in container.decode(video=0):
                frames += 1
                if scale is not None:
                    scale(frame)
    return 1e3 * 2 * (time.process_time() - started) / frames


def random_access(mixture: Mixture, num: int, seed: list[int] = [0]) -> float:  # noqa: B006 (counts the calls)
    """CPU milliseconds a window in random order; one open reader a video file."""
    seed[0] += 1
    rng = np.random.default_rng(seed[0])
    builder = SampleBuilder(mixture, train=True)
    table = mixture.datasets[0].source.episodes
    files = table.video_file[mixture.datasets[0].source.cameras[0]]
    for file in np.unique(files):  # open the files before the clock starts
        builder.build(int(file), 0, int(np.flatnonzero(files == file)[0]), 0, 0)
    started = time.process_time()
    for _ in range(num):
        episode = int(rng.integers(len(table)))
        builder.build(int(files[episode]), 0, episode, int(rng.integers(table.length[episode])), 0)
    spent = 1e3 * (time.process_time() - started) / num
    builder.close()
    return spent


def print_plan(num: int = 1_000_000) -> None:
    """Time and memory of the plan of `num` blocks."""
    place = np.arange(num, dtype=np.int32)
    length = np.random.default_rng(0).integers(100, 500, num).astype(np.int32)
    blocks = DatasetBlocks("d", place, np.zeros(num, np.int32), length, place.astype(np.int64))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        tape = Tape([blocks], [blocks.num_windows], seed=0, batch_size=256)
        tape.batch(0)
        times.append(time.perf_counter() - started)
    tracemalloc.start()
    tape = Tape([blocks], [blocks.num_windows], seed=0, batch_size=256)
    tape.batch(0)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    steps = [time.perf_counter()]
    for step in range(1, 101):
        tape.batch(step * 1000)
        steps.append(time.perf_counter())
    batch = statistics.median(np.diff(steps))
    print(f"\nplan of {num:,} blocks: {statistics.median(times):.3f} s to the first batch, {held / num:.1f} B a block; "
          f"a batch of 256 later: {1e3 * batch:.2f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
