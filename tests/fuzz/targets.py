"""What is fuzzed: {name: a function of hypothesis's draws that reads one damaged file}."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from hypothesis import strategies as st

from opentau_train.checkpoints import contents, manifest, shards
from opentau_train.config.data import SourceSettings
from opentau_train.config.typed import build
from opentau_train.data import keep_ranges
from opentau_train.data.decode.images import ImageError, decode_image
from opentau_train.data.decode.video import VideoPool
from opentau_train.data.decode.video_file import VideoError
from opentau_train.data.mixture.open import open_source
from opentau_train.errors import BadSample, UserError
from opentau_train.types import WindowSpec
from tests.fuzz.mutate import edits, tables, text_of, trees
from tests.lerobot_writer import Camera, Dataset, png, write

Case = Callable[[Any], Any]

FRONT = "observation.images.front"
SET = Dataset((5, 4, 6), cameras={FRONT: Camera(size=(16, 16), episodes_per_file=3)}, episodes_per_data_file=3)


class Room:
    """A directory with a dataset of each format, and a checkpoint, whose files are written anew for each case."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.v30 = write(folder / "v30", SET)
        self.v21 = write(folder / "v21", Dataset(SET.lengths, cameras=SET.cameras, version="v2.1"))
        self.checkpoint = folder / "checkpoint"
        make_checkpoint(self.checkpoint)

    def spoiled(self, file: Path, content: bytes, read: Callable[[], None]) -> None:
        """Read with `file` spoiled; it is as it was afterwards."""
        whole = file.read_bytes()
        file.write_bytes(content)
        try:
            read()
        finally:
            file.write_bytes(whole)


def make_checkpoint(folder: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    (folder / "state").mkdir(parents=True)
    dcp.save(model(), checkpoint_id=folder / "state", no_dist=True)
    stream = {"version": 1, "t": 4, "seed": 0, "sources": {"main": {"draws": 3}}, "epoch_size": 9}
    run = {"version": contents.VERSION, "step": 2, "counters": {"skipped": 0, "bad": 0}, "stream": stream}
    (folder / "run.json").write_text(contents.as_json(run))
    files = manifest.describe(folder, [p for p in folder.rglob("*") if p.is_file()])
    (folder / "files.json").write_text(manifest.to_text(files))
    torch.manual_seed(0)


def model() -> dict[str, Any]:
    import torch

    return {"model": {"a": torch.ones(3, 4), "b": torch.zeros(5)}, "ema": {"a": torch.ones(3, 4)}}


def use(root: Path) -> None:
    """Open a dataset and read the first window of each episode."""
    source = open_source("main", build(SourceSettings, {"root": str(root)}, "data.sources.main"))
    factory = source.cursors(WindowSpec(2, image_size=(16, 16)))
    try:
        cursor = factory.cursor()
        for episode in range(min(3, len(source.episodes))):
            try:
                cursor.read(episode, 0)
            except BadSample:
                continue  # quarantined
        for _ in source.columns(np.arange(len(source.episodes))[:3]):
            pass
    finally:
        factory.close()


@cache
def parquet(path: Path) -> Any:
    return pq.read_table(path)


def bytes_of(table: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def of_tree(file: Callable[[Room], Path], read: Callable[[Room], None]) -> Callable[[Room], Case]:
    def target(room: Room) -> Case:
        path = file(room)
        whole = path.read_bytes()
        cases = trees(json.loads(whole)).map(text_of) | edits(whole)
        return lambda data: room.spoiled(path, data.draw(cases), lambda: read(room))

    return target


def of_lines(name: str) -> Callable[[Room], Case]:
    def target(room: Room) -> Case:
        path = room.v21 / "meta" / name
        whole = path.read_bytes()
        rows = [json.loads(line) for line in whole.splitlines()]
        lines = trees(rows).map(lambda tree: b"\n".join(map(text_of, tree if isinstance(tree, list) else [tree])))
        return lambda data: room.spoiled(path, data.draw(lines | edits(whole)), lambda: use(room.v21))

    return target


def of_parquet(pattern: str) -> Callable[[Room], Case]:
    def target(room: Room) -> Case:
        path = next(room.v30.glob(pattern))
        whole = path.read_bytes()
        changed = tables(parquet(path)).map(bytes_of) | edits(whole) | edits(whole[::-1], 2000).map(lambda b: b[::-1])
        return lambda data: room.spoiled(path, data.draw(changed), lambda: use(room.v30))

    return target


def mp4(room: Room) -> Case:
    path = next(room.v30.glob("videos/**/*.mp4"))
    whole = path.read_bytes()
    boxes = max(0, whole.find(b"moov") - 4)
    spoiled = edits(whole, 64) | edits(whole[boxes:], 2000).map(lambda tail: whole[:boxes] + tail)

    def read() -> None:
        pool = VideoPool()
        cursor = pool.cursor()
        try:
            for seconds in (0.0, 0.1, 0.03, 1e6, 1e300):
                try:
                    cursor.read(path, seconds, 1.0)
                except VideoError:
                    continue
        finally:
            pool.close()

    return lambda data: room.spoiled(path, data.draw(spoiled), read)


def pictures(room: Room) -> Case:
    from PIL import Image

    picture = Image.fromarray(np.arange(48 * 32 * 3, dtype=np.uint32).reshape(32, 48, 3).astype(np.uint8))
    files = []
    for form in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF"):
        out = io.BytesIO()
        picture.save(out, form)
        files.append(out.getvalue())
    files += [files[0]] * 6 + [files[1]] * 3 + [png(np.zeros((8, 8), np.uint16))]
    cases = st.sampled_from(files).flatmap(lambda whole: edits(whole, 200))

    def read(content: bytes) -> None:
        try:
            decode_image(content)
        except ImageError:
            return

    return lambda data: read(data.draw(cases))


def ranges(room: Room) -> Case:
    path = room.folder / "keep.json"
    tree = {"metadata": {"filter_last_n_in_ranges": 1}, "keep_ranges": {"0": [[0, 3]], "1": [[1, 2], [2, 4]], "2": []}}
    cases = (trees(tree) | trees(tree["keep_ranges"])).map(text_of) | edits(text_of(tree))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        filtered = {"use_filter_dict": True, "filter_dict_path": str(path), "filter_key": "{episode_index}"}
        settings = build(SourceSettings, {"root": str(room.v30), **filtered}, "data.sources.main")
        keep_ranges.read(path, "data.sources.main")
        open_source("main", settings)

    return lambda data: read(data.draw(cases))


def checkpoint_files(room: Room) -> None:
    manifest.loss(room.checkpoint)
    manifest.damage(room.checkpoint)


def shard(name: str) -> Callable[[Room], Case]:
    def target(room: Room) -> Case:
        path = room.checkpoint / "state" / name
        whole = path.read_bytes()

        def read() -> None:
            shards.kinds(room.checkpoint)
            shards.read(room.checkpoint, model(), alone=True)

        return lambda data: room.spoiled(path, data.draw(edits(whole)), read)

    return target


def card(room: Room) -> Case:
    """An exported policy's metadata: what stands beside the weights."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from opentau_train.checkpoints.card import PARTS
    from opentau_train.checkpoints.pretrained import load_policy
    from tests.fuzz.policy import exported

    path = exported(room.folder)
    weights = load_file(path)
    with safe_open(path, framework="pt") as opened:
        texts = opened.metadata()
    trees_of = {part: trees(json.loads(texts[part])) for part in PARTS}

    def case(data: Any) -> None:
        part = data.draw(st.sampled_from([*PARTS]))
        spoiled = room.folder / "spoiled.safetensors"
        save_file(weights, spoiled, metadata={**texts, part: json.dumps(data.draw(trees_of[part]))})
        load_policy(spoiled)

    return case


def run_json(room: Room) -> None:
    contents.read_run(room.checkpoint)


class Target(NamedTuple):
    """`make` makes its cases in a room; `share` of all cases."""

    make: Callable[[Room], Case]
    share: int


TARGETS = {
    "info_v30": Target(of_tree(lambda r: r.v30 / "meta/info.json", lambda r: use(r.v30)), 16),
    "info_v21": Target(of_tree(lambda r: r.v21 / "meta/info.json", lambda r: use(r.v21)), 8),
    "episodes_v30": Target(of_parquet("meta/episodes/*/*.parquet"), 10),
    "episodes_v21": Target(of_lines("episodes.jsonl"), 8),
    "tasks_v30": Target(of_parquet("meta/tasks.parquet"), 4),
    "tasks_v21": Target(of_lines("tasks.jsonl"), 4),
    "rows": Target(of_parquet("data/*/*.parquet"), 10),
    "keep_ranges": Target(ranges, 8),
    "pictures": Target(pictures, 14),
    "mp4": Target(mp4, 8),
    "run_json": Target(of_tree(lambda r: r.checkpoint / "run.json", run_json), 3),
    "files_json": Target(of_tree(lambda r: r.checkpoint / "files.json", checkpoint_files), 3),
    "metadata": Target(shard(".metadata"), 2),
    "shards": Target(shard("__0_0.distcp"), 1),
    "card": Target(card, 1),
}

ENDINGS = (UserError,)
"""What a case may end with."""
