"""Normalisation statistics beside those of LeRobot's `compute_stats`, over the same episodes.

LeRobot computes in the data's float32 and takes a quantile from a histogram of 5,000 bins, as the value below which q N
rows lie; here it is numpy's, between the two rows around q (N - 1). So LeRobot's code gets float64 rows and bins that
are fine enough, and quantiles are compared on a dataset in which those two rows are equal.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.mixture.open import open_mixture
from tests import lerobot_writer
from tests.program import DATA

pytestmark = pytest.mark.lerobot

RELATIVE = 1e-6
BINS = 2**21
MOMENTS, QUANTILES = ("mean", "std", "min", "max"), ("q01", "q99")


def statistics_of(root: Path, tmp_path: Path, *more: str) -> tuple[HeadStats, list[str], list[str]]:
    """(statistics over all training episodes, state columns, action columns)."""
    given = ["+recipe=lerobot", f"data.sources.main.root={root}", f"paths.cache_dir={tmp_path / 'cache'}"]
    mixture = open_mixture(load_settings(cli.compose([*given, "data.sources.main.val_split_ratio=0.0", *more])))
    (stats,) = mixture.stats.values()
    reading = mixture.datasets[0].source.reading
    return stats, [c.name for c in reading.state], [c.name for c in reading.actions]


def rows_of(lerobot, root: Path, columns: list[str]) -> list[np.ndarray]:
    """[L, D] f64 of each episode, by LeRobot's own reading."""
    reference = lerobot.Dataset("own/set", root=root, video_backend="pyav")
    table = reference.hf_dataset.with_format(None).select_columns([*columns, "episode_index"])[:]
    parts = [np.array(table[name], np.float64).reshape(len(reference), -1) for name in columns]
    episode = np.array(table["episode_index"])
    return [np.concatenate(parts, axis=1)[episode == number] for number in np.unique(episode)]


def of_lerobot(lerobot, episodes: list[np.ndarray], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    stats, features = lerobot.stats, {"x": {"dtype": "float64"}}
    whole = stats.aggregate_stats([stats.compute_episode_stats({"x": rows}, features) for rows in episodes])["x"]
    if set(QUANTILES) & set(names):
        fine = stats.RunningQuantileStats(num_quantile_bins=BINS)
        fine.update(np.concatenate(episodes))
        whole |= {name: fine.get_statistics()[name] for name in QUANTILES}
    return {name: whole[name] for name in names}


def differing(lerobot, root: Path, tmp_path: Path, names: tuple[str, ...], episodes=None) -> list[str]:
    """The statistics that are farther than `RELATIVE` from LeRobot's, e.g. "state.q01"."""
    more = () if episodes is None else (f"data.sources.main.episodes={episodes}",)
    stats, *columns = statistics_of(root, tmp_path, *more)
    wrong = []
    for kind, chosen in zip(("state", "actions"), columns, strict=True):
        rows = rows_of(lerobot, root, chosen)
        reference = of_lerobot(lerobot, rows if episodes is None else [rows[e] for e in episodes], names)
        for name, value in reference.items():
            if not np.allclose(getattr(getattr(stats, kind), name), value, rtol=RELATIVE, atol=0.0):
                wrong.append(f"{kind}.{name}")
    return wrong


@pytest.mark.parametrize("episodes", [None, [0, 2]])
def test_moments_are_lerobots_on_the_fixture(lerobot, tmp_path, episodes):
    assert differing(lerobot, DATA / "lerobot_v30", tmp_path, MOMENTS, episodes) == []


def saturated(path: Path, outlier: float = 0.0) -> Path:
    """A dataset whose values rest on their bounds for a while, as a gripper's do; `outlier` is added to one of them."""
    rng = np.random.default_rng(0)
    lengths = (150, 90, 120, 60)
    values = {e: np.clip(3.0 + rng.normal(size=(n, 3)), 1.5, 4.5) for e, n in enumerate(lengths)}
    values[2][7, 1] += outlier
    feature = {"dtype": "float32", "shape": [3], "names": None}
    columns = dict.fromkeys(("observation.state", "action"), (feature, lambda e, f: values[e][f].tolist()))
    dataset = lerobot_writer.Dataset(lengths=lengths, cameras={}, columns=columns)
    return lerobot_writer.write(path, dataset)


def test_moments_and_quantiles_are_lerobots_on_a_generated_dataset(lerobot, tmp_path):
    assert differing(lerobot, saturated(tmp_path / "set"), tmp_path, MOMENTS + QUANTILES) == []


def test_one_changed_value_is_noticed(lerobot, tmp_path, monkeypatch):
    root, other = saturated(tmp_path / "set"), saturated(tmp_path / "other", outlier=9.0)
    read = rows_of
    monkeypatch.setattr(f"{__name__}.rows_of", lambda lerobot, _, columns: read(lerobot, other, columns))
    wrong = differing(lerobot, root, tmp_path, MOMENTS + QUANTILES)
    assert {"state.mean", "state.std", "state.max", "actions.mean"} <= set(wrong)
