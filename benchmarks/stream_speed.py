"""What a window of the stream costs: CPU against a bare decode and random-access loaders, and the plan itself.

    python benchmarks/stream_speed.py [--repeats 5] [--lerobot PYTHON]

Writes datasets of 2 cameras with natural pictures (h264 with a keyframe every 2 and every 30 frames, AV1 every 2) and
reads them in one process and one thread. All sides read the same files in turns; CPU milliseconds a window, medians:

- `decode`: every file in order, the frames thrown away;
- `scaled`: the same, each frame brought to the stream's 96x96 RGB by libswscale;
- `rgb`: the same, each frame an RGB array of its own size (`frame.to_ndarray(format="rgb24")`);
- `stream`: the program's own: 64 lanes of 240 windows, rows, normalisation, images, batches;
- `random`: windows in random order through the program's own reader, all files open: a seek for each window;
- `reopened`: windows in random order, pictures only: open the file, seek, decode, `to_ndarray`, close;
- `map`: samples in random order of LeRobot's own dataset class in the environment of PYTHON, all files open;
- `streaming`: the same of its StreamingLeRobotDataset, once its buffer of 1,000 frames is full.

`first batch`: seconds by the clock from opening the dataset to 32 samples, without imports: LeRobot's, and the
program's with a new cache, for which it reads all rows for their statistics and the videos' keyframes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from support.datasets import AV1, H264, Repeated, write_dataset
from support.program import machine, mixture_of, with_episodes

from opentau_train.data.decode.fit import fit
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.load.stream import ShardDataset, TrainPlan
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.order.tape import Tape
from opentau_train.types import Address

SMALL, LARGE = (180, 320), (480, 640)
VARIANTS = {
    "h264 180x320, GOP 2": ("libx264", 2, H264, SMALL),
    "h264 180x320, GOP 30": ("libx264", 30, H264, SMALL),
    "AV1 180x320, GOP 2": ("libsvtav1", 2, AV1, SMALL),
    "h264 480x640, GOP 30": ("libx264", 30, H264, LARGE),
}
LENGTHS = [160] * 12
"""All in one file a camera: LeRobot's streaming reads no other videos."""
BATCH, LANES_PER_SAMPLE = 32, 2
EPISODES = 96
"""Those of the dataset again and again: lanes must be long against what is read ahead, as in real datasets."""
BASES, LOADERS, LEROBOT = ("decode", "scaled", "rgb"), ("random", "reopened"), ("map", "streaming")
STEPS = 10
"""Batches of the stream a turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path, help="keep the datasets there, and use them again")
    parser.add_argument("--lerobot", metavar="PYTHON", help="of an environment with LeRobot, to measure that too")
    options = parser.parse_args()
    repeats = options.repeats
    loaders = LOADERS + LEROBOT if options.lerobot else LOADERS
    print(f"{machine()}; one thread, medians of {repeats}\n")
    print_head("video", "B a frame", *BASES, "stream", *loaders, "decoded a frame used")
    ratios, firsts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (codec, gop, tuning, size)) in enumerate(VARIANTS.items()):
            root = (options.data or Path(folder)) / f"speed{number}"
            write_dataset(
                root, LENGTHS, size=size, codec=codec, gop=gop, options=tuning, episodes_per_file=len(LENGTHS)
            )
            cells, first = print_variant(name, root, repeats, loaders, options.lerobot)
            ratios.append(cells)
            firsts.append([name, *(f"{seconds:.2f}" for seconds in first.values())])
        sides = *(f"stream / {side}" for side in BASES), *(f"{side} / stream" for side in loaders)
        for head, rows in ((sides, ratios), ([f"first batch: {side}" for side in first], firsts)):
            print()
            print_head("video", *head)
            for cells in rows:
                print(f"| {' | '.join(cells)} |")
        print_phase(options.data or Path(folder))
    print_plan()


def print_head(*names: str) -> None:
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)


def print_variant(
    name: str, root: Path, repeats: int, loaders: Sequence[str], python: str | None
) -> tuple[list[str], dict[str, float]]:
    """Print the row of times, and give that of ratios, and {side: seconds to its first batch}."""
    first = {"stream": first_batch(root)}
    mixture = mixture_of(root, f"data.lanes_per_sample={LANES_PER_SAMPLE}", "data.num_workers=0")
    files = sorted(root.rglob("*.mp4"))
    mixture = with_episodes(mixture, EPISODES)
    stream, builder = open_stream(mixture, mixture.tape(BATCH))
    warm_up(stream)
    before, seen = builder[0].frames_decoded, 0
    sides: dict[str, Callable[[], float]] = {
        "decode": lambda: decode(files),
        "scaled": lambda: decode(files, scaling(mixture.spec.image_size)),
        "rgb": lambda: decode(files, lambda frame: frame.to_ndarray(format="rgb24")),
        "stream": lambda: take(stream, STEPS),
        "random": lambda: random_access(mixture, 48),
        "reopened": lambda: reopening(mixture, 48),
    }
    times: dict[str, list[float]] = {side: [] for side in (*BASES, "stream", *loaders)}
    with ExitStack() as stack:
        for kind in LEROBOT if python is not None else ():
            sides[kind], first[kind] = stack.enter_context(lerobot(str(python), kind, root, mixture))
        for _ in range(repeats):
            for side, found in times.items():
                found.append(sides[side]())
                seen += STEPS * BATCH * (side == "stream")
    decoded = (builder[0].frames_decoded - before) / (2 * seen)
    m = {side: statistics.median(found) for side, found in times.items()}
    size = sum(path.stat().st_size for path in files) / (2 * sum(LENGTHS))
    cells = [name, f"{size:.0f}", *(f"{median:.3f}" for median in m.values()), f"{decoded:.3f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    ratios = [f"{m['stream'] / m[side]:.2f}" for side in BASES]
    return [name, *ratios, *(f"{m[side] / m['stream']:.1f}" for side in loaders)], first


def first_batch(root: Path) -> float:
    """Seconds from opening the dataset to its first batch, in this process, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        mixture = mixture_of(root, "data.num_workers=0", cache=Path(cache))
        next(iter(ShardDataset(mixture, TrainPlan(mixture.tape(BATCH), rank=0, size=1, first=0, last=1), train=True)))
        return time.perf_counter() - started


@contextmanager
def lerobot(
    python: str, kind: str, root: Path, mixture: Mixture, num: int = 48
) -> Iterator[tuple[Callable[[], float], float]]:
    """What measures `num` samples of LeRobot's dataset, in a process of the interpreter `python`, and the seconds to
    its first batch."""
    script = Path(__file__).parent / "baselines" / "lerobot_loader.py"
    fps = mixture.datasets[0].source.fps
    command = [python, str(script), kind, str(root), str(mixture.spec.chunk_length), str(fps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout
    opened = answers.readline()
    if not opened:
        raise SystemExit(f"{python} can't read {root} with LeRobot: see above")

    def measure() -> float:
        requests.write(f"{num}\n")
        requests.flush()
        return float(answers.readline())

    try:
        yield measure, float(opened.split()[1])
    finally:
        requests.close()
        process.wait()


def open_stream(mixture: Mixture, tape: Tape) -> tuple[Iterator, list]:
    """The training stream in this process, and the list that its reader will be in."""
    readers: list = []
    source = mixture.datasets[0].source
    cursors = source.cursors

    def noted(window):
        readers.append(cursors(window))
        return readers[-1]

    object.__setattr__(source, "cursors", noted)
    return iter(ShardDataset(mixture, TrainPlan(tape, rank=0, size=1, first=0, last=10**6), train=True)), readers


def warm_up(stream: Iterator) -> None:
    """Open every lane, a few rows deep: what a start costs is the business of first_batch.py."""
    for _ in range(LANES_PER_SAMPLE * 5):
        next(stream)


def take(stream: Iterator, steps: int) -> float:
    """CPU milliseconds a window over the next `steps` batches."""
    started = time.process_time()
    windows = sum(len(next(stream).t) for _ in range(steps))
    return 1e3 * (time.process_time() - started) / windows


def decode(files: list[Path], convert: Callable[[av.VideoFrame], object] | None = None) -> float:
    """CPU milliseconds for as many frames as a window has (one a camera), read in order."""
    started, frames = time.process_time(), 0
    for path in files:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_count = 1
            for frame in container.decode(video=0):
                frames += 1
                if convert is not None:
                    convert(frame)
    return 1e3 * 2 * (time.process_time() - started) / frames


def scaling(size: tuple[int, int]) -> Callable[[av.VideoFrame], np.ndarray]:
    """Frames as RGB arrays of the largest size inside `size` (H, W), with one context of libswscale and one thread."""
    reformatter = VideoReformatter()

    def scaled(frame: av.VideoFrame) -> np.ndarray:
        height, width = fit(frame.height, frame.width, size)
        small = reformatter.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BILINEAR, threads=1)
        return small.to_ndarray()

    return scaled


def random_access(mixture: Mixture, num: int) -> float:
    """CPU milliseconds a window in random order; one open reader a video file."""
    builder = SampleBuilder(mixture, training=True)
    source = mixture.datasets[0].source
    table, files = source.episodes, source.reading.stored.videos[source.cameras[0]].file
    for file in np.unique(files):  # open the files before the clock starts
        builder.build(int(file), Address(0, int(np.flatnonzero(files == file)[0]), 0, 0))
    started = time.process_time()
    for episode, frame in random_windows(table.length, num):
        builder.build(int(files[episode]), Address(0, episode, frame, 0))
    spent = 1e3 * (time.process_time() - started) / num
    builder.close()
    return spent


def reopening(mixture: Mixture, num: int) -> float:
    """CPU milliseconds a window in random order; its pictures only, files opened for each."""
    reading = mixture.datasets[0].source.reading
    started = time.process_time()
    for episode, frame in random_windows(reading.episodes.length, num):
        for span in (places.span(episode) for places in reading.stored.videos.values()):
            with av.open(str(span.path)) as container:
                video = container.streams.video[0]
                video.thread_count = 1
                wanted = round((span.start + frame / reading.fps) / video.time_base)
                container.seek(wanted, stream=video)
                next(f for f in container.decode(video) if f.pts >= wanted).to_ndarray(format="rgb24")
    return 1e3 * (time.process_time() - started) / num


_draws = np.random.default_rng(0)


def random_windows(length: np.ndarray, num: int) -> list[tuple[int, int]]:
    """`num` times (episode, frame), others at every call."""
    episodes = _draws.integers(len(length), size=num)
    return [(int(e), int(_draws.integers(length[e]))) for e in episodes]


def print_phase(folder: Path, batch: int = 4, lanes_per_sample: int = 4) -> None:
    """Frames decoded over whole phases, with the starts and the ends of all lanes."""
    print()
    print_head("keyframes every", "rows of a phase", "windows", "frames decoded a frame used")
    lengths = np.random.default_rng(0).integers(100, 400, 140).tolist()
    for gop in (2, 30):
        tiny = [np.full((64, 64, 3), 3 * i, np.uint8) for i in range(60)]
        root = folder / f"phase{gop}"
        # One file an episode: v3.0 files are episodes laid end to end, each of which starts with a keyframe, too.
        write_dataset(root, lengths, size=(64, 64), cameras=1, gop=gop, episodes_per_file=1, frames=Repeated(tiny, 400))
        for rows in (256, 512, 1024):
            mixture = mixture_of(root, f"data.lanes_per_sample={lanes_per_sample}", "data.num_workers=0",
                                 f"data.phase_rows={rows}")  # fmt: skip
            tape = mixture.tape(batch)
            stream, factories = open_stream(mixture, tape)
            steps = tape.epoch_size // batch
            used = sum(len(next(stream).t) for _ in range(steps))
            print(f"| {gop} frames | {rows} | {used:,} | {factories[0].frames_decoded / used:.3f} |", flush=True)


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
