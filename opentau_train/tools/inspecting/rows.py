"""What the rows of some of a dataset's episodes hold: the spread of every dimension, raw and normalised, and what is
far from the rest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.settings import Settings
from opentau_train.data.lerobot.rows import prompts_by_episode
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.data.lint.reading import chosen_episodes, is_fetched
from opentau_train.data.mixture import statistics
from opentau_train.data.mixture.ends import make_ends
from opentau_train.data.mixture.mixture import Dataset, Mixture
from opentau_train.data.mixture.normalize import HeadStats, Method, affine_of
from opentau_train.data.mixture.tally import count, whole
from opentau_train.data.mixture.team import alone
from opentau_train.data.source import PromptedSource
from opentau_train.data.transforms.normalize import Affine
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.errors import UserError

MOST_ROWS = 300_000
"""Of a dataset that are read."""
MOST_FOR_STATISTICS = 2_000_000
"""Rows of a mixture whose statistics are computed as a training would."""
NUM_BARS = 40
SPAN: Mapping[Method, float] = {"mean_std": 5.0, "min_max": 1.5, "quantiles": 1.5}
"""How far to both sides of zero normalised values are shown; further ones stand at the ends."""


@dataclass(frozen=True)
class Outlier:
    """A value further from the middle 98 % of its dimension than these are wide; the furthest one of its episode."""

    episode: int
    frame: int
    value: float
    normalised: float


@dataclass(frozen=True)
class Dimension:
    """One dimension of the rows that were read: its `extremes` and the middle 98 %; `counts` [N] between `edges` [N+1],
    in the dataset's units, and `normalised` [N], between `SPAN` to both sides of zero. `outliers`: the furthest first,
    one an episode, `num_outliers` values in all."""

    name: str
    extremes: tuple[float, float]
    middle: tuple[float, float]
    counts: NDArray[np.int64]
    edges: NDArray[np.float64]
    normalised: NDArray[np.int64]
    outliers: tuple[Outlier, ...]
    num_outliers: int
    is_constant: bool


class _Episode(NamedTuple):
    """One episode's rows: its norm head, its number, `state` [L, S], of each step of a chunk its `actions` [n, A]."""

    head: str
    number: int
    state: NDArray
    actions: list[NDArray]

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.state).all() and all(np.isfinite(step).all() for step in self.actions))


@dataclass
class _Vector:
    """Values of one vector, row by row: `values` [N, D], `normalised` [N, D], and where each row is from."""

    values: list[NDArray] = field(default_factory=list)
    normalised: list[NDArray] = field(default_factory=list)
    episode: list[NDArray] = field(default_factory=list)
    frame: list[NDArray] = field(default_factory=list)

    def add(self, values: NDArray, affine: Affine, number: int, frame: NDArray, step: int = 0) -> None:
        """Add rows of one episode, which begin at its frames `frame`, as step number `step` of a chunk."""
        self.values.append(values)
        self.episode.append(np.full(len(values), number))
        self.frame.append(frame)
        row = min(step, len(affine.offset) - 1) if affine.offset.ndim == 2 else ...
        self.normalised.append((values - affine.offset[row]) * affine.scale[row])


@dataclass(frozen=True)
class Read:
    """What was read of a dataset: the numbers of `episodes`, `num_rows` of them, the dimensions of its `state` and
    `actions`; `identical` groups of episodes with the same rows, `not_finite` episodes with NaN or infinities, and
    `tasks` {text: episodes that have it}."""

    episodes: tuple[int, ...]
    num_rows: int
    state: tuple[Dimension, ...]
    actions: tuple[Dimension, ...]
    identical: tuple[tuple[int, ...], ...]
    not_finite: tuple[int, ...]
    tasks: Mapping[str, int]


def read(dataset: Dataset, mixture: Mixture, stats: Mapping[str, HeadStats], num: int) -> Read:
    """Up to `num` episodes, evenly over the dataset, and as many as have `MOST_ROWS` rows. They are normalised by
    `stats`, or, where these don't know the episodes' norm head, by statistics of themselves."""
    lengths = dataset.source.episodes.length
    positions = chosen_episodes(dataset.source, min(num, max(1, int(MOST_ROWS // max(1.0, lengths.mean())))))
    episodes = list(_episodes(dataset, mixture, positions))
    seen: dict[bytes, list[int]] = {}
    for own in episodes:
        rows = own.state.tobytes() + b"".join(step.tobytes() for step in own.actions)
        seen.setdefault(hashlib.blake2b(rows, digest_size=16).digest(), []).append(own.number)
    finite, method = [own for own in episodes if own.is_finite], mixture.settings.normalization
    state, actions = _Vector(), _Vector()
    for head in dict.fromkeys(own.head for own in finite):
        of_head = [own for own in finite if own.head == head]
        known = stats.get(head) or _own_statistics(dataset, of_head, mixture.settings.normalization_per_timestep)
        affines = affine_of(known.state, method), affine_of(known.actions, method)
        for own in of_head:
            state.add(own.state, affines[0], own.number, np.arange(len(own.state)))
            starts = np.arange(0, len(own.state), len(own.actions))  # chunks end to end: as many actions as rows
            for k, step in enumerate(own.actions):
                at = starts[starts < len(step)]
                actions.add(step[at], affines[1], own.number, at, k)
    return Read(
        tuple(sorted(own.number for own in episodes)),
        sum(len(own.state) for own in episodes),
        _dimensions(state, dataset.state_names, SPAN[method]),
        _dimensions(actions, dataset.action_names, SPAN[method]),
        tuple(tuple(sorted(same)) for same in seen.values() if len(same) > 1),
        tuple(sorted(own.number for own in episodes if not own.is_finite)),
        _tasks(dataset, positions),
    )


def _episodes(dataset: Dataset, mixture: Mixture, positions: NDArray[np.int64]) -> Iterator[_Episode]:
    """The episodes at `positions` whose rows can be read; one step of actions where these are the rows themselves."""
    by_chunks = Pipeline(dataset.transforms).per_chunk or mixture.settings.normalization_per_timestep
    table = dataset.source.episodes
    read: Iterator[tuple[int, NDArray, list[NDArray]]] = (
        dataset.chunks(positions)
        if by_chunks
        else ((position, state, [actions]) for position, state, actions in dataset.columns(positions))
    )
    for position, state, actions in read:
        head = mixture.groups[int(dataset.group_of[position])].norm_head
        yield _Episode(head, int(table.episode_index[position]), state, actions)


def _own_statistics(dataset: Dataset, episodes: Sequence[_Episode], per_timestep: bool) -> HeadStats:
    rows = ((dataset.name, own.number, own.state, own.actions) for own in episodes)
    num_rows = sum(len(own.state) for own in episodes)
    steps = [sum(map(len, step)) for step in zip(*(own.actions for own in episodes), strict=True)]
    steps = steps if per_timestep else [sum(steps)]
    names = dataset.state_names, dataset.action_names
    ends = make_ends(num_rows, (len(names[0]), len(names[1])), steps)
    return whole([count(rows, ends)], ends, alone().gather, names, {})


def _dimensions(vector: _Vector, names: Sequence[str], span: float) -> tuple[Dimension, ...]:
    if not vector.values:
        return ()
    values, normalised = np.concatenate(vector.values).astype(np.float64), np.concatenate(vector.normalised)
    where = np.concatenate(vector.episode), np.concatenate(vector.frame)
    columns = zip(names, values.T, normalised.T, strict=True)
    return tuple(_dimension(*column, *where, span) for column in columns)


def _dimension(
    name: str, values: NDArray, normalised: NDArray, episode: NDArray, frame: NDArray, span: float
) -> Dimension:
    low, high = np.quantile(values, [0.01, 0.99])
    extremes = float(values.min()), float(values.max())
    counts, edges = np.histogram(values, NUM_BARS)
    shown = np.histogram(np.clip(normalised, -span, span), NUM_BARS, (-span, span))[0]
    beyond = np.maximum(low - values, values - high)
    out = np.flatnonzero(beyond > high - low) if high > low else np.zeros(0, np.int64)
    furthest: dict[int, int] = {}
    for row in out[np.argsort(-beyond[out], kind="stable")].tolist():
        furthest.setdefault(int(episode[row]), row)
    outliers = tuple(
        Outlier(e, int(frame[row]), float(values[row]), float(normalised[row])) for e, row in furthest.items()
    )
    middle = float(low), float(high)
    return Dimension(name, extremes, middle, counts, edges, shown, outliers, len(out), extremes[0] == extremes[1])


def _tasks(dataset: Dataset, positions: NDArray[np.int64]) -> Counter[str]:
    """{task: how many of the episodes at `positions` have it}."""
    source, told = dataset.source, Counter[str]()
    if isinstance(source, LeRobotDataset):
        if source.reading.prompt_columns or source.reading.task_column:
            for _, kinds in prompts_by_episode(source.reading, positions):
                told.update({text for texts in kinds for text in texts})
    elif isinstance(source, PromptedSource):
        for position in positions:
            told.update(set(source.prompts(np.array([position]))))
    return told


def read_statistics(settings: Settings, mixture: Mixture) -> tuple[dict[str, HeadStats], str]:
    """(statistics by norm head, "" or why there are none): those of a training, from the cache where it has them."""
    fetched = [d.name for d in mixture.datasets if is_fetched(d.source)]
    if fetched:
        return {}, f"all files of {', '.join(fetched)} would be fetched from their server for others"
    num_rows = sum(int(d.source.episodes.length.sum(dtype=np.int64)) for d in mixture.datasets)
    if num_rows > MOST_FOR_STATISTICS:
        return (
            {},
            f"the mixture has {num_rows:,} rows, and statistics of at most {MOST_FOR_STATISTICS:,} are computed here",
        )
    try:
        return statistics.compute(settings, mixture.datasets, mixture.groups, alone()), ""
    except UserError as error:  # a page that says so is worth more than none
        return {}, f"a training ends here: {error.what} ({error.where}). {error.remedy}"
