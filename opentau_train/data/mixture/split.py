"""The split as a record: which episodes a run held out, kept with its checkpoints and compared on resume."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.config.settings import ValidationSettings
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.errors import UserError

log = logging.getLogger(__name__)

NAMED = 8
"""How many episodes of each difference an error names."""


def held_out_episodes(mixture: Mixture) -> dict[str, str]:
    """{dataset: its held-out episode numbers}, as ranges such as "3, 17-20": about 6 bytes an episode at most."""
    return {d.name: ranges(d.source.episodes.episode_index[d.held_out].tolist()) for d in mixture.datasets}


def ranges(numbers: Iterable[int]) -> str:
    """Sorted distinct integers as text: [3, 17, 18, 19] -> "3, 17-19"."""
    ordered = np.unique(np.fromiter(numbers, np.int64))
    if not len(ordered):
        return ""
    parts = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return ", ".join(f"{p[0]}" if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def must_be_whole(validation: ValidationSettings) -> bool:
    """Whether every held-out window must be readable."""
    return validation.every > 0 and validation.on_bad_sample == "fail"


def held_out_error(name: str, what: str, lost: Iterable[int], without: Iterable[int]) -> UserError:
    """Held-out episodes `lost` of the dataset have no `what`, and validation replaces no window; `without` are all
    that the remedy excludes."""
    where = f"data.sources.{name}"
    listed = ",".join(map(str, sorted(set(without))))
    return UserError(
        f"dataset '{name}' has no {what} of the held-out episodes {ranges(lost)}",
        where=where,
        remedy=f"restore the files, or leave the episodes out: {where}.exclude_episodes=[{listed}]",
    )


MOST_EPISODES = 10**7


def numbers(text: str) -> set[int]:
    """The inverse of `ranges`."""
    members: set[int] = set()
    for part in filter(None, text.split(", ")):
        first, _, last = part.partition("-")
        episodes = range(int(first), int(last or first) + 1)
        if len(episodes) > MOST_EPISODES:
            raise ValueError(f"'{part}' are more than {MOST_EPISODES:,} episodes")
        members.update(episodes)
    return members


def check_split(saved: Mapping[str, str], mixture: Mixture, *, restart: bool = False) -> None:
    """Compare a checkpoint's record with the split in use; with `restart` a difference is only warned of.

    Raises `UserError` naming the episodes of a dataset that the checkpoint's run held out and this one trains on,
    or the other way round. A dataset that only one of the two has is refused by `order/state.py`."""
    for name, held_out in held_out_episodes(mixture).items():
        if name not in saved or saved[name] == held_out:
            continue
        before, now = numbers(saved[name]), numbers(held_out)
        parts = [
            f"{change}: {_some(episodes)}"
            for change, episodes in (("no longer held out", before - now), ("newly held out", now - before))
            if episodes
        ]
        what = f"dataset '{name}' is split otherwise than in the checkpoint; episodes {'; '.join(parts)}"
        if restart:
            log.warning("%s: what was trained on is validated, or the other way round", what)
            continue
        raise UserError(
            what,
            where=f"data.sources.{name}",
            remedy="restore seed, val_split_ratio, val_episodes, episodes and the dataset, or start a new run",
        )


def trained_on(saved: Mapping[str, str], mixture: Mixture) -> dict[str, str]:
    """{dataset: the validation episodes of `mixture` that a checkpoint with the split `saved` trained on}, for the
    datasets of the same names."""
    overlap = {}
    for name, held_out in held_out_episodes(mixture).items():
        both = numbers(held_out) - numbers(saved[name]) if name in saved else set()
        if both:
            overlap[name] = ranges(both)
    return overlap


def _some(episodes: set[int]) -> str:
    named = ranges(sorted(episodes)[:NAMED])
    return named if len(episodes) <= NAMED else f"{named} and {len(episodes) - NAMED} more"


def validation_split(
    name: str, numbers: NDArray[np.int64], ratio: float, seed: int, chosen: tuple[int, ...] | None = None
) -> NDArray[np.bool_]:
    """[E] bool, True for held-out episodes: those whose hash of (seed, dataset, episode number) lies below `ratio`.

    Each episode decides for itself: adding datasets or episodes moves none of the others. With `ratio` > 0 at least
    one episode is held out (the one with the smallest hash) as long as one remains for training; with 1.0 all are.
    `chosen` names the held-out episodes instead. Raises `UserError` for one that isn't there.
    """
    if chosen is not None:
        missing = sorted(set(chosen) - set(numbers.tolist()))
        if missing:
            raise UserError(
                f"episode {missing[0]} can't be held out: it is not among the {len(numbers)} episodes in use",
                where=f"data.sources.{name}.val_episodes",
                remedy="name episodes of the dataset that `episodes` and `exclude_episodes` leave in",
            )
        return np.isin(numbers, chosen)
    if ratio == 1.0:
        return np.ones(len(numbers), bool)
    if ratio <= 0 or len(numbers) < 2:
        return np.zeros(len(numbers), bool)
    draw = rng.uniform(rng.fold(rng.key(seed, "split", name), numbers))[:, 0]
    held_out = draw < ratio
    if not held_out.any():
        held_out[np.argmin(draw)] = True
    if held_out.all():
        held_out[np.argmax(draw)] = False
    return held_out
