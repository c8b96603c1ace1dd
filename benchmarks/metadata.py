"""CPU seconds to open a dataset of many episodes, beside reading the columns of its metadata with pyarrow alone.

    python benchmarks/metadata.py [--repeats 5] [--episodes 95000 1000000]

The metadata of v3.0 with two cameras, 500 episodes a file, in 20 parquet files as LeRobot
writes them; of rows and video there is one small file under all names (opening asks for sizes only). `shuffled` lists
the same episodes in no order, which is rare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.datasets import write_dataset
from support.program import machine, settings_of

from opentau_train.data.mixture.open import open_source

CAMERAS = ("observation.images.left", "observation.images.wrist")
ROWS, FPS = 300, 15
A_FILE, A_VIDEO, META_FILES = 500, 500, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--episodes", type=int, nargs="+", default=[95_000, 1_000_000])
    parser.add_argument("--quick", action="store_true", help="a few episodes, to see that it runs")
    options = parser.parse_args()
    repeats, episodes = (1, [2_000]) if options.quick else (options.repeats, options.episodes)
    print(f"{machine()}; CPU seconds, medians (means) of {repeats} interleaved turns\n")
    print("| episodes | listed | opened | pyarrow alone | opened, wall |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for num in episodes:
            roots = {name: Path(folder) / f"{name}{num}" for name in ("in order", "shuffled")}
            for name, root in roots.items():
                write(root.parent / root.name.replace(" ", "_"), num, shuffled=name == "shuffled")
            found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in roots}
            for _ in range(repeats):
                for name, root in roots.items():
                    found[name].append(measured(root.parent / root.name.replace(" ", "_")))
            for name, rows in found.items():
                cells = [f"{statistics.median(c):.2f} ({statistics.mean(c):.2f})" for c in zip(*rows, strict=True)]
                print(f"| {num:,} | {name} | {' | '.join(cells)} |", flush=True)


def measured(root: Path) -> tuple[float, float, float]:
    """(CPU seconds of opening, of pyarrow alone, seconds of opening)."""
    given = ["+recipe=lerobot", f"data.sources.main.root={root}"]
    settings = settings_of(given).data.sources["main"]
    cpu, wall = time.process_time(), time.perf_counter()
    source = open_source("main", settings)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert len(source.episodes) and set(source.cameras) == {c.rpartition(".")[2] for c in CAMERAS}
    start = time.process_time()
    for path in sorted((root / "meta/episodes").rglob("*.parquet")):
        table = pq.read_table(path, use_threads=False)
        _ = [table.column(name).to_numpy() for name in table.column_names if name != "tasks"]
    return cpu, time.process_time() - start, wall


def write(root: Path, num: int, *, shuffled: bool) -> None:
    """The metadata of `num` episodes; a small dataset's files under all the names that they give."""
    like = write_dataset(root.with_suffix(".like"), [2], size=(32, 32), cameras=2)
    order = np.random.default_rng(0).permutation(num) if shuffled else np.arange(num)
    folder = root / "meta/episodes/chunk-000"
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(order, META_FILES)):
        pq.write_table(_episodes(part), folder / f"file-{number:03d}.parquet")
    info = json.loads((like / "meta/info.json").read_text())
    video = next(f for f in info["features"].values() if f["dtype"] == "video")
    info["features"] = {n: f for n, f in info["features"].items() if f["dtype"] != "video"} | dict.fromkeys(
        CAMERAS, video
    )
    info |= {"total_episodes": num, "total_frames": num * ROWS, "fps": FPS}
    (root / "meta/info.json").write_text(json.dumps(info))
    os.link(like / "meta/tasks.parquet", root / "meta/tasks.parquet")
    rows, mp4 = next((like / "data").rglob("*.parquet")), next((like / "videos").rglob("*.mp4"))
    for file in range(-(-num // A_FILE)):
        _link(rows, root / f"data/chunk-{file // 1000:03d}/file-{file % 1000:03d}.parquet")
    for file in range(-(-num // A_VIDEO)):
        for camera in CAMERAS:
            _link(mp4, root / f"videos/{camera}/chunk-{file // 1000:03d}/file-{file % 1000:03d}.mp4")


def _link(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, path)


def _episodes(index: np.ndarray) -> pa.Table:
    file, video = index // A_FILE, index // A_VIDEO
    seconds = (index % A_VIDEO) * (ROWS / FPS)
    columns = {
        "episode_index": index,
        "tasks": pa.array([["move"]] * len(index)),
        "length": np.full(len(index), ROWS),
        "data/chunk_index": file // 1000,
        "data/file_index": file % 1000,
        "dataset_from_index": index * ROWS,
        "dataset_to_index": (index + 1) * ROWS,
    }
    for camera in CAMERAS:
        columns |= {
            f"videos/{camera}/chunk_index": video // 1000,
            f"videos/{camera}/file_index": video % 1000,
            f"videos/{camera}/from_timestamp": seconds,
            f"videos/{camera}/to_timestamp": seconds + ROWS / FPS,
        }
    return pa.table(columns)


if __name__ == "__main__":
    main()
