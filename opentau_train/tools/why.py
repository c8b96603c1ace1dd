"""Which samples were behind a step's loss or gradient? Needs a run with `flight_recorder=true`.

    python -m opentau_train.tools.why RUN --step 120 [--top 16] [--out strip.png [KEY=VALUE ...]]

Lists the step's samples, the largest share of its loss first, and writes their frames side by side as one picture. The
frames are read from where the run's config.yaml says that the data are; `KEY=VALUE` changes that, for instance
`data.sources.main.root=/new/place` for a dataset that was moved since, or given relative to another directory.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 for what the machine does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from opentau_train import cli, composing, strangers
from opentau_train.config.bounds import at_least
from opentau_train.config.settings import Settings, load_settings
from opentau_train.config.trust import check_targets, targets
from opentau_train.data.fields import centred
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.open import open_plan
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.data.mixture.table import align
from opentau_train.errors import EXIT_OK, BadSample, UserError
from opentau_train.tools.flight import Recorded, RecordedStep, read_step
from opentau_train.tools.options import Parser
from opentau_train.tools.out import check_format, make_directory, writing
from opentau_train.types import WindowSpec

TILE = (120, 160)
"""(H, W) pixels of one camera's image in the strip."""
CAPTION = 48
NEIGHBOURS = 20
"""Steps before and after, whose median gradient norm the step's is compared to."""


FIXED = tuple(key for key in Settings.__dataclass_fields__ if key not in ("data", "paths"))
"""Keys that the command line can't change: they don't say where the frames are."""


def describe(recorded: RecordedStep, num: int) -> str:
    """The step's numbers and its worst `num` samples as a table."""
    others = [norm for step, norm in recorded.norms.items() if step != recorded.step]
    around = f" (median of the {len(others)} steps around it: {np.median(others):.4g})" if others else ""
    terms = sorted({term for sample in recorded.samples for term in sample.loss})
    rows: list[tuple[str, ...]] = [("share", *terms, "dataset", "episode", "frame", "pass", "rank", "t")]
    for s in recorded.worst(num):
        losses = (f"{s.loss[term]:.4g}" if term in s.loss else "-" for term in terms)
        rows.append(
            (
                f"{s.share:.1%}",
                *losses,
                s.dataset,
                str(s.episode),
                str(s.frame),
                str(s.pass_index),
                str(s.rank),
                str(s.t),
            )
        )
    shown = sum(s.share for s in recorded.worst(num))
    return "\n".join(
        [
            f"step {recorded.step}: loss {recorded.loss:.5g}, gradient norm {recorded.grad_norm:.4g}{around}, "
            f"lr {recorded.lr:.3g}",
            f"{len(recorded.samples)} samples; {min(num, len(recorded.samples))} of them make {shown:.1%} of the loss:",
            *align(rows),
        ]
    )


def strip(mixture: Mixture, samples: Sequence[Recorded]) -> Image.Image:
    """The samples' frames as one picture: a column each, worst first, its cameras below each other."""
    columns = [_column(mixture, sample, place) for place, sample in enumerate(samples, start=1)]
    height = max(len(column) for column in columns)
    filled = [np.pad(column, ((0, height - len(column)), (0, 0), (0, 0))) for column in columns]
    picture = Image.fromarray(np.concatenate(filled, axis=1))
    draw = ImageDraw.Draw(picture)
    for place, s in enumerate(samples):
        text = f"{place + 1}: {s.share:.1%}\n{s.dataset[:22]}\nepisode {s.episode}, frame {s.frame}"
        draw.multiline_text((place * TILE[1] + 4, 2), text, fill=(255, 255, 255), spacing=2)
    return picture


def _column(mixture: Mixture, sample: Recorded, place: int) -> NDArray[np.uint8]:
    """[CAPTION + cameras * H, W, 3]: room for the caption, then the images; grey where a window can't be read."""
    caption = np.zeros((CAPTION, TILE[1], 3), np.uint8)
    try:
        images = _images(mixture, sample)
    except BadSample as error:
        print(f"{place}: {error}", file=sys.stderr)
        images = [np.full((*TILE, 3), 96, np.uint8)]
    return np.concatenate([caption, *images])


def _images(mixture: Mixture, sample: Recorded) -> list[NDArray[np.uint8]]:
    """[H, W, 3] of every camera of the sample's frame. Raises `BadSample`, and `UserError` where the data has no such
    episode any more."""
    dataset = next((d for d in mixture.datasets if d.name == sample.dataset), None)
    numbers = np.zeros(0, np.int64) if dataset is None else dataset.source.episodes.episode_index
    positions = np.flatnonzero(numbers == sample.episode)
    if dataset is None or not len(positions):
        raise UserError(
            f"episode {sample.episode} of dataset '{sample.dataset}' is not in the data any more",
            where="the run's config.yaml",
            remedy="restore the dataset's files, or leave out --out",
        )
    files = dataset.source.cursors(WindowSpec(chunk_length=1, image_size=TILE))
    try:
        images = files.cursor().read(int(positions[0]), sample.frame).images
        tiles = [np.zeros((*TILE, 3), np.uint8) for _ in images]
        for tile, (_, image) in zip(tiles, sorted(images.items()), strict=True):
            centred(tile, *image.shape[1:3])[:] = image[-1]
        return tiles
    finally:
        files.close()


def read_settings(run_dir: Path, overrides: Sequence[str], trust: Sequence[str] = ()) -> Settings:
    """The settings that the run recorded, with the `overrides` of its data. Raises `UserError` where there are none,
    and where its data are of a class that nobody has vouched for (`trust`: modules): the run may be a stranger's."""
    path = run_dir / "config.yaml"
    try:
        content = strangers.read_bytes(path)
        tree = yaml.safe_load(content)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"not a run directory: {error}", where=str(path), remedy="give a run's directory") from error
    if not isinstance(tree, dict):
        raise UserError("the file holds no settings", where=str(path), remedy="restore it: it is a copy of the run's")
    if b"${" in content:  # the program writes it resolved; a file's own could tell what the machine has
        raise UserError("it holds an interpolation, ${...}", where=str(path), remedy="take it from whom you trust")
    changed = composing.recompose(tree, overrides, FIXED)
    check_targets({"data": changed["data"]}, str(path), trust, {of for _, of in targets(tree)}, configured=True)
    return load_settings(changed)


def show(options: argparse.Namespace) -> None:
    """Print the table and write the picture that `options` ask for. Raises `UserError`; for a mistake in `options`,
    before anything is read."""
    at_least("--top", options.top, 1)
    if options.out is not None:
        check_format(options.out)
        make_directory(options.out)
    elif options.overrides:
        raise UserError(
            f"{options.overrides[0]} changes where the frames are read, and no frames are asked for",
            remedy="add --out FILE, or leave it out",
        )
    recorded = read_step(options.run, options.step, NEIGHBOURS)
    settings = None if options.out is None else read_settings(options.run, options.overrides, options.trust)
    print(describe(recorded, options.top))
    if settings is not None:
        mixture = open_plan(settings, resolve_sources(settings))
        picture = strip(mixture, recorded.worst(options.top))
        with writing(options.out):
            picture.save(options.out)
        print(f"frames: {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = Parser("why", __doc__)
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--step", type=int, required=True, help="the step, as in metrics.jsonl")
    parser.add_argument("--top", type=int, default=16, help="samples to show (16)")
    parser.add_argument("--out", type=Path, help="file for their frames, e.g. strip.png")
    parser.add_of_recorded_run()
    options = parser.parse_intermixed_args(arguments)

    def work() -> int:
        show(options)
        return EXIT_OK

    return cli.answer(work)


if __name__ == "__main__":
    sys.exit(main())
