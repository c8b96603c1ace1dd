"""Parts of the page on a mixture that are drawn: lengths of episodes, dimensions of rows, films."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opentau_train.data.mixture.mixture import Dataset
from opentau_train.data.mixture.normalize import Method
from opentau_train.pages.document import Html, html, joined, paragraph, picture, tag
from opentau_train.pages.drawing import histogram
from opentau_train.tools.inspecting.clips import Episode
from opentau_train.tools.inspecting.rows import NUM_BARS, SPAN, Dimension, Read

MOST_DIMENSIONS = 32
"""Of a vector that are drawn."""
NAMED = 3
"""Episodes that are named where there may be many."""


def of_lengths(dataset: Dataset) -> Html:
    """A histogram of the lengths of a dataset's episodes."""
    length, numbers = dataset.source.episodes.length, dataset.source.episodes.episode_index
    counts, edges = np.histogram(length, min(NUM_BARS, max(1, int(np.ptp(length)) + 1)))
    drawn = histogram(counts, edges, f"frames of an episode ({dataset.source.fps:g} a second)", "episodes")
    short, long = (int(f(length)) for f in (np.argmin, np.argmax))
    told = (
        f"{dataset.name}: {len(length):,} episodes of {int(length[short]):,} (episode {numbers[short]}) to "
        f"{int(length[long]):,} frames (episode {numbers[long]}), median {np.median(length):,.0f}, "
        f"{_duration(length.sum(dtype=np.int64) / dataset.source.fps)} in all"
    )
    return tag("figure", paragraph(told), drawn)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def of_dimensions(name: str, read: Read, method: Method) -> Html:
    """A pair of histograms for each dimension of a dataset, raw and normalised by `method`."""
    span, parts = SPAN[method], []
    for vector in (read.state, read.actions):
        parts += [_dimension(dimension, span) for dimension in vector[:MOST_DIMENSIONS]]
        if len(vector) > MOST_DIMENSIONS:
            parts.append(paragraph(f"{len(vector) - MOST_DIMENSIONS} more dimensions are left out."))
    opened = tag("summary", name)
    return tag("details", opened, tag("div", *parts, class_="plots"), open="")


def _dimension(d: Dimension, span: float) -> Html:
    marks = [o.value for o in d.outliers[: 2 * NAMED]]
    raw = histogram(d.counts, d.edges, "raw", "rows", marks, width=300)
    edges = np.linspace(-span, span, NUM_BARS + 1)
    normalised = histogram(
        d.normalised, edges, "normalised", "rows", [o.normalised for o in d.outliers[: 2 * NAMED]], 300
    )
    told = f"{d.extremes[0]:.4g} to {d.extremes[1]:.4g}, middle 98 % {d.middle[0]:.4g} to {d.middle[1]:.4g}"
    named = "; ".join(
        f"episode {o.episode}, frame {o.frame}: {o.value:.4g} (normalised {o.normalised:.3g})"
        for o in d.outliers[:NAMED]
    )
    more = len(d.outliers) - NAMED
    far = f"{d.num_outliers:,} far values: {named}{f'; and {more} more episodes' if more > 0 else ''}"
    notes = [tag("p", told, class_="told")] + ([tag("p", far, class_="told bad")] if d.outliers else [])
    return tag("figure", tag("figcaption", d.name), tag("div", raw, normalised, class_="pair"), *notes)


def of_films(name: str, episodes: Sequence[Episode]) -> Html:
    """The films of some episodes, those of one below its heading."""
    made = []
    for episode in episodes:
        told = f"{name}, episode {episode.number}, {episode.length:,} frames"
        made.append(tag("h3", f"{told}: {episode.task}" if episode.task else told))
        if episode.cause:
            made.append(tag("p", f"can't be read: {episode.cause}", class_="bad"))
        films = []
        for film in episode.films:
            caption = tag("figcaption", film.camera)
            pictures = [
                picture(film.clip, "webp", f"{told}, {film.camera}: clip"),
                picture(film.stills, "webp", f"{told}, {film.camera}: stills"),
            ]
            films.append(tag("figure", caption, tag("div", *pictures, class_="film")))
        made.append(tag("div", *films, class_="films"))
    return joined(map(html, made))
