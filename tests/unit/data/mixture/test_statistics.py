"""Whose rows a norm head's statistics are of: those that are there now, of robots that someone says are the same."""

from __future__ import annotations

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opentau_train import composing
from opentau_train.config.arguments import settable
from opentau_train.config.settings import load_settings
from opentau_train.data.lerobot import identity
from opentau_train.data.mixture.open import open_mixture
from opentau_train.errors import UserError
from tests.lerobot_writer import DEFAULT_COLUMNS, Dataset, vector, write


def mixture(tmp_path, *overrides):
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        given = ["+recipe=lerobot", f"paths.cache_dir={tmp_path / 'cache'}", *overrides]
        return open_mixture(load_settings(composing.plain(hydra.compose("train", [settable(o) for o in given]))))


def scale_actions(root, factor: float) -> list[int]:
    """Rewrite the rows in place, as large as before; returns the files' sizes."""
    paths = sorted((root / "data").rglob("*.parquet"))
    for path in paths:
        table = pq.read_table(path)
        values = pa.array((np.stack(table["action"].to_numpy()) * factor).tolist(), table["action"].type)
        changed = table.set_column(table.column_names.index("action"), "action", values)
        pq.write_table(changed, path, compression="none", use_dictionary=False)
    return [path.stat().st_size for path in paths]


def test_rows_changed_in_place_get_statistics_of_their_own(tmp_path, monkeypatch):
    """Also in a file whose end says nothing of it, so that only its time of writing tells."""
    monkeypatch.setattr(identity, "END_BYTES", 0)
    root = write(tmp_path / "set", Dataset(cameras={}, columns=DEFAULT_COLUMNS))
    found, sizes, prints = [], [], []
    for factor in (1.0, 4.0):
        sizes.append(scale_actions(root, factor))
        opened = mixture(tmp_path, f"data.sources.main.root={root}")
        found.append(opened.stats["arm::default"].actions.mean)
        prints.append(opened.datasets[0].source.fingerprint)
    assert sizes[0] == sizes[1] and prints[0] == prints[1]
    np.testing.assert_allclose(found[1], 4 * found[0])


def test_another_split_gets_statistics_of_its_own(tmp_path):
    """From the same files and the same cache: those of the episodes that are trained on now."""
    root = write(tmp_path / "set", Dataset(cameras={}, columns=DEFAULT_COLUMNS))
    where = [f"data.sources.main.root={root}", "validation.on_bad_sample=skip"]  # held-out rows aren't looked for
    means = {}
    for held_out in (0, 1, 0):
        opened = mixture(tmp_path, *where, f"data.sources.main.val_episodes=[{held_out}]")
        mean = means.setdefault(held_out, opened.stats["arm::default"].actions.mean)
        np.testing.assert_array_equal(opened.stats["arm::default"].actions.mean, mean)
    assert (means[0] != means[1]).any()


@pytest.fixture
def two(tmp_path):
    """Roots of two datasets whose actions have as many dimensions, of other names."""
    roots = []
    for place, names in enumerate((["j1", "j2"], ["x_mm", "y_mm"])):
        columns = {"observation.state": vector(2, names=["a", "b"]), "action": vector(2, names=names)}
        dataset = Dataset(cameras={}, columns=columns, info={"robot_type": None})
        roots.append(f"data.sources.s{place}.root={write(tmp_path / f's{place}', dataset)}")
    return [*roots, "~data.sources.main"]


def test_robots_of_no_stated_type_share_statistics_only_under_the_same_names(two, tmp_path):
    with pytest.raises(UserError, match=r"say no robot type.*'action\.j1' and 'action\.x_mm'"):
        mixture(tmp_path, *two)
    apart = mixture(tmp_path, *two, "data.sources.s0.robot_type=arm", "data.sources.s1.robot_type=gantry")
    assert sorted(apart.stats) == ["arm::default", "gantry::default"]


def test_robots_said_to_be_the_same_share_statistics_with_a_warning_of_other_names(two, tmp_path, caplog):
    caplog.set_level("WARNING", "opentau_train")
    pooled = mixture(tmp_path, *two, "data.sources.s0.robot_type=arm", "data.sources.s1.robot_type=arm")
    assert list(pooled.stats) == ["arm::default"] and pooled.stats["arm::default"].actions.count > sum(
        Dataset().lengths
    )
    assert "though dimensions are named 'action.j1' and 'action.x_mm'" in caplog.text
