"""Rewrite a LeRobot dataset's videos with other distances of keyframes, another size or codec.

    python -m opentau_train.tools.reencode ROOT --out NEW [--gop 2] [--size 224 224] [--codec libx264] [--crf 20]

Each frame keeps its time exactly, and each episode begins with a keyframe. Every new frame is decoded again and held
against the old one: another time, or a PSNR below --psnr, is an error, and nothing is left in NEW. All else is copied.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 for what the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Interpolation

from opentau_train import cli
from opentau_train.config.bounds import at_least, positive
from opentau_train.config.data import SourceSettings
from opentau_train.data.decode.video_file import OPTIONS, VideoError, VideoFile
from opentau_train.data.lerobot import LeRobotSource
from opentau_train.data.lerobot.episodes import VideoPlaces
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.errors import EXIT_OK, UserError, check_machine_read
from opentau_train.strangers import check_plain
from opentau_train.tools.options import Parser
from opentau_train.tools.out import make_directory, writing
from opentau_train.tools.words import NAME, in_own_words

PLAIN = "yuv420p"
"""What a decoder of any robot's computer can show."""


@dataclass(frozen=True)
class Coding:
    """How videos are encoded: `size` (H, W) or None as they are; `gop` frames from one keyframe to the next at most."""

    codec: str
    gop: int
    crf: int
    size: tuple[int, int] | None
    psnr: float

    @property
    def options(self) -> dict[str, str]:
        """FFmpeg's, for the codec: no reordered frames, and keyframes nowhere but where they are asked for."""
        own = {"libx264": {"bf": "0", "sc_threshold": "0", "forced-idr": "1", "keyint_min": str(self.gop)}}
        return {"crf": str(self.crf), "g": str(self.gop), **own.get(self.codec, {})}


@dataclass(frozen=True)
class Checked:
    """What the comparison of one file found: its frames, their keyframes, the lowest PSNR in dB, bytes before and
    after."""

    frames: int
    keyframes: int
    psnr: float
    before: int
    after: int


def pictures(path: Path, coding: Coding) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(seconds, picture in the size that `coding` asks for) of each frame of a video. Raises `UserError`."""
    try:
        check_plain(path)
        with av.open(f"file:{path}", options=dict(OPTIONS), metadata_errors="replace") as container:
            for frame in container.decode(video=0):
                if frame.pts is None or frame.time_base is None or frame.is_corrupt:
                    raise VideoError(f"frame {frame.pts} is damaged, or has no time")
                height, width = coding.size or (frame.height, frame.width)
                at, base = frame.pts, frame.time_base
                if (height, width) != (frame.height, frame.width) or frame.format.name != PLAIN:
                    frame = frame.reformat(width, height, PLAIN, interpolation=Interpolation.AREA)
                    frame.pts, frame.time_base = at, base
                yield at * base, frame
    except (av.FFmpegError, OSError, VideoError) as error:
        check_machine_read(error, path)
        remedy = "restore the file, or leave its episodes out of the dataset first"
        raise UserError(f"the video can't be read: {error}", where=str(path), remedy=remedy) from error


def encode(old: Path, new: Path, coding: Coding, begins: Sequence[float], fps: float) -> None:
    """Write the video anew, with a keyframe at each of the seconds `begins` too. Raises `UserError`."""
    try:
        _encode(old, new, coding, begins, fps)
    except av.FFmpegError as error:
        check_machine_read(error, new)
        remedy = "try another --codec or --size"
        raise UserError(f"the encoder refuses it: {error}", where=str(old), remedy=remedy) from error


def _encode(old: Path, new: Path, coding: Coding, begins: Sequence[float], fps: float) -> None:
    waiting = sorted(begins, reverse=True)
    with av.open(str(new), "w") as container:
        stream: Any = None
        for seconds, frame in pictures(old, coding):
            if stream is None:
                stream = container.add_stream(coding.codec, rate=Fraction(fps).limit_denominator(1001))
                stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, PLAIN
                stream.options = coding.options
                stream.time_base = stream.codec_context.time_base = frame.time_base
                stream.codec_context.gop_size = coding.gop
                for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
                    setattr(stream.codec_context, name, getattr(frame, name))
            frame.pict_type = PictureType.NONE
            while waiting and waiting[-1] <= seconds + Fraction(1, 2) / Fraction(fps):
                waiting.pop()
                frame.pict_type = PictureType.I
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))


def compare(old: Path, new: Path, coding: Coding) -> Checked:
    """Hold the new video against the old one, frame by frame. Raises `UserError` at the first that differs."""
    count, worst = 0, math.inf
    for before, after in zip_longest(pictures(old, coding), pictures(new, coding)):
        if before is None or after is None or before[0] != after[0]:
            times = ["none" if found is None else f"{float(found[0]):.6f} s" for found in (before, after)]
            raise UserError(
                f"frame {count} was shown at {times[0]}, and of the new video at {times[1]}",
                where=str(old),
                remedy="try another --codec: this one doesn't keep the file's clock",
            )
        first, second = (found[1].to_ndarray(format="rgb24").astype(np.float32) for found in (before, after))
        error = float(np.square(first - second).mean())
        worst = min(worst, 10 * math.log10(255**2 / error) if error else math.inf)
        if worst < coding.psnr:
            raise UserError(
                f"frame {count} has a PSNR of {worst:.1f} dB against the old one, below {coding.psnr:g}",
                where=str(old),
                remedy=f"lower --crf ({coding.crf}), or --psnr if that is good enough",
            )
        count += 1
    file = VideoFile(new)
    keyframes = len(file.keyframes)
    file.close()
    return Checked(count, keyframes, worst, old.stat().st_size, new.stat().st_size)


def reencode(source: LeRobotDataset, root: Path, out: Path, coding: Coding) -> Iterator[tuple[str, Checked]]:
    """(path below the dataset, what was found) of each video, written to `out`; all other files are copied. Raises
    `UserError`."""
    videos = {places.files.relative(n): (places, n) for places in source.reading.stored.videos.values()
              for n in np.unique(places.file).tolist()}  # fmt: skip
    with writing(out):
        shutil.copytree(root, out, ignore=lambda folder, names: [
            name for name in names if os.path.relpath(Path(folder) / name, root) in videos])  # fmt: skip
    for relative, (places, number) in sorted(videos.items()):
        new = out / relative
        make_directory(new)
        encode(root / relative, new, coding, _begins(places, number), source.fps)
        yield relative, compare(root / relative, new, coding)
    _tell_info(out / "meta" / "info.json", source, coding)


def _begins(places: VideoPlaces, number: int) -> list[float]:
    return places.start[places.file == number].tolist()


def _tell_info(path: Path, source: LeRobotDataset, coding: Coding) -> None:
    """Write into info.json how the videos are stored now."""
    tree = json.loads(path.read_bytes())
    for places in source.reading.stored.videos.values():
        feature = tree["features"][places.files.video_key]
        told = feature.setdefault("info", {})
        told |= {"video.codec": av.Codec(coding.codec, "w").canonical_name, "video.pix_fmt": PLAIN}
        if coding.size is not None:
            told |= {"video.height": coding.size[0], "video.width": coding.size[1]}
            shape = feature.get("shape") or []
            channels_first = len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3)
            feature["shape"] = [3, *coding.size] if channels_first else [*coding.size, 3]
    with writing(path):
        path.write_text(json.dumps(tree, indent=4) + "\n")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("reencode", __doc__)
    parser.add_argument("root", type=Path, help="the dataset's directory")
    parser.add_argument("--out", type=Path, required=True, help="the new dataset's directory")
    parser.add_argument("--gop", type=int, default=2, help="frames from one keyframe to the next at most (2)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels, even numbers; default: as it is")
    parser.add_argument("--codec", default="libx264", help="FFmpeg's name of an encoder (libx264)")
    parser.add_argument("--crf", type=int, default=20, help="the encoder's quality, lower is better (20)")
    parser.add_argument("--psnr", type=float, default=30.0, help="least dB of a new frame against the old one (30)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = _arguments(arguments)

    def work() -> int:
        at_least("--gop", options.gop, 1)
        at_least("--crf", options.crf, 0)
        positive("--psnr", options.psnr)
        for pixels in options.size or ():
            at_least("--size", pixels, 16)
        if any(pixels % 2 for pixels in options.size or ()):
            raise UserError(f"videos of {PLAIN} have even sides", where="--size", remedy="give even numbers")
        if options.codec not in av.codecs_available:
            raise UserError(f"no encoder '{options.codec}'", where="--codec", remedy="give libx264 or libsvtav1")
        if options.out.exists():
            raise UserError(f"{options.out} exists", where="--out", remedy="name a directory that doesn't")
        make_directory(options.out)
        size = tuple(options.size) if options.size else None
        coding = Coding(options.codec, options.gop, options.crf, size, options.psnr)
        try:
            source = LeRobotSource().open(NAME, SourceSettings(root=str(options.root)))
        except UserError as error:
            raise in_own_words(error, options.root) from error
        with writing(options.out):
            folder = tempfile.TemporaryDirectory(prefix=f"{options.out.name}.", dir=options.out.parent)
        with folder:
            found, partial = [], Path(folder.name) / "dataset"
            for relative, checked in reencode(source, options.root, partial, coding):
                found.append(checked)
                print(f"{relative}: {checked.frames} frames, {checked.keyframes} keyframes, PSNR {checked.psnr:.1f} dB")
            with writing(options.out):
                os.replace(partial, options.out)
        before, after = sum(c.before for c in found), sum(c.after for c in found)
        print(
            f"{options.out}: {len(found)} videos, {sum(c.frames for c in found)} frames at their own times, "
            f"{before / 1e6:.1f} -> {after / 1e6:.1f} MB"
        )
        return EXIT_OK

    return cli.answer(work)


if __name__ == "__main__":
    sys.exit(main())
