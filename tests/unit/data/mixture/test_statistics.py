"""Whose rows a norm head's statistics are of: those that are there now, of robots that someone says are the same."""

from __future__ import annotations

import dataclasses
import json
import threading
from itertools import pairwise

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opentau_train import composing
from opentau_train.config.arguments import settable
from opentau_train.config.settings import load_settings
from opentau_train.data.lerobot import identity
from opentau_train.data.mixture import statistics, tally, team
from opentau_train.data.mixture.open import open_mixture, open_plan
from opentau_train.data.mixture.team import Team, parts, share_of_cores
from opentau_train.errors import UserError
from tests.lerobot_writer import DEFAULT_COLUMNS, Dataset, vector, write


def settings_of(tmp_path, *overrides):
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        given = ["+recipe=lerobot", f"paths.cache_dir={tmp_path / 'cache'}", *overrides]
        return load_settings(composing.plain(hydra.compose("train", [settable(o) for o in given])))


def mixture(tmp_path, *overrides):
    return open_mixture(settings_of(tmp_path, *overrides))


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


# -- several threads and processes ------------------------------------------------------------------------------------

LENGTHS = [23, 5, 41, 17, 8, 30, 12, 9, 33, 20, 3, 14]
COLUMNS = {"observation.state": vector(3), "action": vector(2, 0.5)}


class Ranks:
    """Processes that meet in `gather`, here threads."""

    def __init__(self, size: int):
        self.values, self.barrier = [None] * size, threading.Barrier(size)

    def team(self, rank: int, num_cores: int) -> Team:
        def gather(value):
            self.values[rank] = value
            self.barrier.wait(60)
            values = list(self.values)
            self.barrier.wait(60)
            return values

        return Team(rank, len(self.values), num_cores, gather)


def computed(tmp_path, root, *overrides, size: int = 1, num_cores: int = 1) -> list[str]:
    """The statistics as each process has them, from no cache."""
    given = [f"data.sources.main.root={root}", "data.sources.main.val_split_ratio=0.3", *overrides]
    settings = settings_of(tmp_path, *given)
    plan, ranks, found = open_plan(settings, settings.data.sources), Ranks(size), [""] * size

    def one(rank: int) -> None:
        own = dataclasses.replace(
            settings.paths, cache_dir=str(tmp_path / f"{size} {num_cores} {len(overrides)} {rank}")
        )
        apart = dataclasses.replace(settings, paths=own)
        stats = statistics.compute(apart, plan.datasets, plan.groups, ranks.team(rank, num_cores))
        found[rank] = json.dumps({head: of.to_json() for head, of in stats.items()})

    if size == 1:
        one(0)
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size) if size > 1]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def many_parts(tmp_path, monkeypatch):
    """A dataset of six files, in about as many parts, of several blocks."""
    monkeypatch.setattr(team, "PART_ROWS", 40)
    monkeypatch.setattr(tally, "BLOCK_ROWS", 10)
    return write(tmp_path / "set", Dataset(cameras={}, columns=COLUMNS, lengths=LENGTHS, row_group_rows=16))


@pytest.mark.parametrize("more", [(), ("data.normalization_per_timestep=true", "data.chunk_length=6")])
def test_statistics_are_the_same_bits_on_any_number_of_threads_and_processes(more, many_parts, tmp_path):
    (alone,) = computed(tmp_path, many_parts, *more)
    assert json.loads(alone)["arm::default"]["state"]["count"] > 100
    for size, num_cores in ((1, 2), (1, 3), (2, 2), (3, 1)):
        assert computed(tmp_path, many_parts, *more, size=size, num_cores=num_cores) == [alone] * size


def spoil(root, place: int, how: str) -> None:
    path = sorted((root / "data").rglob("*.parquet"))[place]
    if how == "nan":
        table = pq.read_table(path)
        values = np.stack(table["action"].to_numpy())
        values[3] = np.nan
        changed = pa.array(values.tolist(), table["action"].type)
        pq.write_table(table.set_column(table.column_names.index("action"), "action", changed), path)
    else:
        content = path.read_bytes()
        path.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("broken", "rows can't be read"),
        ("nan", "action[0] is nan in dataset 'main', episode 4, frame 3; so are values of"),
    ],
)
def test_rows_that_are_no_good_end_all_threads_with_the_first_of_their_errors(how, told, many_parts, tmp_path):
    for place in (2, 4):
        spoil(many_parts, place, how)
    errors = []
    for num_cores in (1, 3):
        with pytest.raises(UserError) as caught:
            computed(tmp_path, many_parts, "data.sources.main.val_split_ratio=0", num_cores=num_cores)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and told in errors[0] and "episode 4" in errors[0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_parts_are_all_episodes_by_files_and_of_about_so_many_rows(many_parts, tmp_path):
    settings = settings_of(tmp_path, f"data.sources.main.root={many_parts}")
    source = open_plan(settings, settings.data.sources).datasets[0].source
    chosen = np.array([1, 2, 3, 5, 6, 7, 8, 9, 11])
    found = parts(source, chosen)
    assert np.concatenate(found).tolist() == chosen.tolist() and len(found) > 2
    files, length = source.row_files(), source.episodes.length
    for part, after in pairwise(found):
        assert length[part].sum() < 2 * 40 + max(LENGTHS)
        shared = files[part[-1]] == files[after[0]]
        assert not shared or length[np.isin(files, files[after[0]])].sum() > 40, "a small file is cut"
    assert parts(source, chosen[:0]) == []


def test_ranks_of_a_node_share_its_processors_and_bound_ones_keep_theirs(monkeypatch):
    monkeypatch.setattr(team, "own_cores", lambda: {0, 1, 2, 3, 4, 5})
    others = [(0, {0, 1, 2, 3, 4, 5}), (0, {0, 1, 2, 3, 4, 5}), (8, {0, 1, 2, 3, 4, 5})]
    assert share_of_cores(0, lambda own: [own, *others]) == 2
    assert share_of_cores(0, lambda own: [own, (0, {6, 7}), (8, {0})]) == 6
    assert share_of_cores(0, lambda own: [own] + [(0, set(range(6)))] * 20) == 1


def test_rows_read_are_told_as_they_are_read(many_parts, tmp_path):
    settings = settings_of(tmp_path, f"data.sources.main.root={many_parts}", "data.sources.main.val_split_ratio=0")
    plan, told = open_plan(settings, settings.data.sources), []
    statistics.compute(settings, plan.datasets, plan.groups, Team(tell=lambda *numbers: told.append(numbers)))
    assert {total for _, total in told} == {sum(LENGTHS)} and told[-1][0] == sum(LENGTHS)
    assert all(0 < before < after for (before, _), (after, _) in pairwise(told))
