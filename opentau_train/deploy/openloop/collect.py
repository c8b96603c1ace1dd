"""From a dataset's windows to a recording: each is shown to a policy as a robot would show it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from opentau_train.config import typed
from opentau_train.config.data import SourceSettings
from opentau_train.data.conventions.between import rotations_between
from opentau_train.data.source import Source
from opentau_train.deploy.openloop.players import Player, Reads
from opentau_train.deploy.openloop.recording import Recording
from opentau_train.errors import BadSample, UserError
from opentau_train.types import RawWindow, WindowSpec

log = logging.getLogger(__name__)

NAME = "dataset"


def open_dataset(root: str, reads: Reads, options: Mapping[str, Any]) -> tuple[Source, SourceSettings]:
    """The dataset in `root`, read as the policy's own was, but for the `options`, settings as those of
    `data.sources.NAME`. Raises `UserError` where it has other actions or another state."""
    try:
        settings = typed.build(SourceSettings, {**reads.source, **options, "root": root}, f"data.sources.{NAME}")
        source = typed.instantiate(settings.arguments, f"data.sources.{NAME}").open(NAME, settings)
    except UserError as error:
        told = (text.replace(f"data.sources.{NAME}", "source") for text in (error.what, error.where, error.remedy))
        what, where, remedy = told
        raise UserError(what, where=where or root, remedy=remedy) from error
    for vector in ("action_names", "state_names"):
        there, wanted = getattr(source, vector), getattr(reads, vector)
        if there != wanted:
            key = "actions" if vector == "action_names" else "state"
            raise UserError(
                f"the dataset's {key} are {_short(there)}, and the policy's {_short(wanted)}",
                where=root,
                remedy=f"name the columns: source.{key}=[...], source.drop_dims=[...]",
            )
    return source, settings


def collect(
    player: Player,
    source: Source,
    settings: SourceSettings,
    episodes: int | Sequence[int],
    every: int | None = None,
    seed: int = 0,
) -> Recording:
    """What `player` predicts for every `every`-th frame (None: chunks end to end) of the first `episodes` episodes, or
    of those with these numbers. Windows that can't be read are left out, and told. Raises `UserError`."""
    reads = player.reads
    rows: list[dict[str, Any]] = []
    for position, frame, window in _windows(reads, source, settings, _positions(source, reads, episodes), every):
        observation = {**window.images, **({"state": window.state} if reads.state_names else {})}
        if window.prompts:
            observation["task"] = window.prompts[0]
        start = time.perf_counter()
        predicted = player.act(observation, seed)
        spent = time.perf_counter() - start
        if predicted.shape != window.actions.shape:
            raise UserError(
                f"{player.name} gives a chunk of {list(predicted.shape)}, not {list(window.actions.shape)}",
                where=reads.norm_head,
                remedy="serve the policy that the metadata are of",
            )
        rows.append(
            {
                "predicted": predicted,
                "recorded": window.actions,
                "is_pad": window.is_pad,
                "state": window.state,
                "episode": source.episodes.episode_index[position],
                "frame": frame,
                "second": frame / source.fps,
                "milliseconds": 1000 * spent,
            }
        )
    if not rows:
        raise UserError("no window can be read", where=str(settings.root), remedy="see above what each lacks")
    return Recording(
        **{name: np.stack([row[name] for row in rows]) for name in rows[0]},
        about={
            "policy": player.name,
            "dataset": str(settings.root),
            "norm_head": reads.norm_head,
            "seed": seed,
            "fps": reads.fps,
            "action_names": list(reads.action_names),
            "units": list(reads.units),
            "state_names": list(reads.state_names),
        },
    )


def _windows(
    reads: Reads, source: Source, settings: SourceSettings, positions: Sequence[int], every: int | None
) -> Iterator[tuple[int, int, RawWindow]]:
    """(the episode's position, the frame, the window), pictures as large as they are stored."""
    between = rotations_between(reads.convention, source.action_names)
    spec = WindowSpec(reads.chunk_length, reads.history, None, settings.fps, between=between)
    rows = max(1, round(reads.chunk_length * source.fps / reads.fps))
    factory = source.cursors(spec)
    with closing(factory), closing(factory.cursor()) as cursor:
        for position in positions:
            for frame in range(0, int(source.episodes.length[position]), every or rows):
                try:
                    yield position, frame, cursor.read(position, frame)
                except BadSample as error:
                    log.warning("left out: %s", error)


def _positions(source: Source, reads: Reads, episodes: int | Sequence[int]) -> list[int]:
    """Places of the episodes in the source's table, of the robot's control mode."""
    table, mode = source.episodes, reads.norm_head.partition("::")[2]
    fits = np.array([name == mode for name in table.control_modes])[table.control_mode]
    if not fits.any():
        modes = ", ".join(table.control_modes)
        remedy = f"set norm_head to a robot of it, or source.control_mode={mode}"
        raise UserError(f"the dataset has no episode of {mode}, but {modes}", where=str(source.name), remedy=remedy)
    if isinstance(episodes, int):
        return [int(i) for i in np.flatnonzero(fits)[:episodes]]
    places = {int(number): i for i, number in enumerate(table.episode_index) if fits[i]}
    missing = [number for number in episodes if number not in places]
    if missing:
        known = sorted(places)
        remedy = f"name some of {known[0]} to {known[-1]}"
        raise UserError(f"the dataset has no episode {missing[0]} of {mode}", where="episodes", remedy=remedy)
    return [places[number] for number in episodes]


def _short(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) or "(none)"
    return f"{shown}, ... ({len(names)})" if len(names) > 4 else shown
