"""A directory of datasets by outcome: which sources it becomes, what they are told, and that they train."""

import logging

import numpy as np
import pytest

from opentau_train import cli
from opentau_train.config.data import SourceSettings
from opentau_train.config.settings import Settings, load_settings
from opentau_train.data.lerobot.outcomes import by_outcome
from opentau_train.data.mixture.open import open_mixture, open_plan
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.errors import UserError
from tests.droid_datasets import published_filter, write_cosmos
from tests.program import TINY_POLICY, metrics, train_here

DROID = "data.sources.droid"
RANGES = [[[0, 12]], [[5, 30]], [], [[2, 20]]]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A directory as the release has it, with another file beside."""
    root = tmp_path_factory.mktemp("release")
    write_cosmos(root / "success")
    write_cosmos(root / "failure", "failure", (20, 22, 24))
    (root / "README.md").write_text("a dataset card")
    return root


def cosmos(root, *overrides: str) -> Settings:
    return load_settings(cli.compose(["data=droid_cosmos", f"{DROID}.root={root}", *overrides]))


def opened(settings: Settings):
    return open_plan(settings, resolve_sources(settings))


def test_both_outcomes_are_sources_and_failures_are_validated_only(release, caplog):
    caplog.set_level(logging.INFO)
    mixture = opened(cosmos(release, f"{DROID}.val_split_ratio=0.3"))
    assert [d.name for d in mixture.datasets] == ["droid", "droid_failure"]
    good, bad = mixture.datasets
    assert (len(good.source.episodes), len(bad.source.episodes)) == (4, 3)
    assert mixture.draws == (good.train.num_windows, 0) and bad.train.num_windows == 0 < bad.validation.num_windows
    assert [g.share > 0 for g in mixture.groups] == [True, False]
    assert "droid is success/, droid_failure is failure/ with weight 0: validated, not trained on" in caplog.text


def test_a_weight_that_is_set_trains_on_failures(release):
    mixture = opened(cosmos(release, f"{DROID}.failure_weight=0.25", f"{DROID}.weight=0.75"))
    share = mixture.draws[1] / sum(mixture.draws)
    assert abs(share - 0.25) < 0.01 and mixture.datasets[1].train.num_windows > 0


def test_statistics_are_those_of_the_success_episodes(release, tmp_path):
    small = [f"paths.cache_dir={tmp_path}", "data.image_size=[32,32]"]
    both = open_mixture(cosmos(release, *small)).stats["arm::joint"]
    alone = open_mixture(cosmos(release / "success", *small)).stats["arm::joint"]
    np.testing.assert_array_equal(both.actions.mean, alone.actions.mean)


def test_only_successes_leaves_the_failures_out(release, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert [d.name for d in opened(cosmos(release, f"{DROID}.success_only=true")).datasets] == ["droid"]
    assert "nothing else is read (success_only)" in caplog.text
    (tmp_path / "success").symlink_to(release / "success")
    assert [d.name for d in opened(cosmos(tmp_path)).datasets] == ["droid"]
    assert "there is no failure/" in caplog.text


def test_a_dataset_is_read_as_it_is_whatever_stands_beside_its_meta(release, tmp_path):
    for name in ("meta", "data", "videos"):
        (tmp_path / name).symlink_to(release / "failure" / name)
    (tmp_path / "success").symlink_to(release / "success")
    settings = SourceSettings(root=str(tmp_path))
    assert by_outcome("x", settings, str(tmp_path)) == {"x": settings}
    assert by_outcome("x", SourceSettings(), str(release)) == {"x": SourceSettings()}


def test_episode_numbers_are_those_of_the_successes(release):
    mixture = opened(cosmos(release, f"{DROID}.exclude_episodes=[3]", f"{DROID}.val_episodes=[0]"))
    assert [len(d.source.episodes) for d in mixture.datasets] == [3, 3]


def test_a_source_of_the_name_of_the_failures_is_refused_with_a_remedy_that_works(release):
    taken = [f"{DROID}_failure.weight=0.5", f"{DROID}_failure.actions=[action]"]
    with pytest.raises(UserError, match="droid_failure is what droid's directory") as refused:
        opened(cosmos(release, *taken))
    remedy = [word for word in refused.value.remedy.split() if word.startswith("data.sources.")]
    settings = load_settings(cli.compose(["data=droid_cosmos", *taken, *remedy]))
    assert [d.name for d in open_plan(settings, resolve_sources(settings)).datasets] == ["droid", "droid_failure"]


def test_the_published_filter_fits_the_shipped_key_and_says_what_it_kept(release, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    keep = published_filter(tmp_path / "keep_ranges.json", RANGES)
    filtered = [f"{DROID}.use_filter_dict=true", f"{DROID}.filter_dict_path={keep}"]
    good, _ = opened(cosmos(release, *filtered)).datasets
    kept = {int(n): (int(s), int(k)) for n, s, k in zip(good.train.number, good.train.start, good.train.length)}
    whole = {0: (0, 12), 1: (5, 25), 3: (2, 18)}
    assert kept and all(whole[n] == kept[n] for n in kept)
    assert "by gs://xembodiment_data/r2d2/r2d2-data-full/{episode_id}/recordings/MP4--gs://" in caplog.text
    assert "4 of 4 found among 5 keys" in caplog.text
    with pytest.raises(UserError, match="the filter leaves no window"):  # the file knows no failure
        opened(cosmos(release, *filtered, f"{DROID}.failure_weight=0.2"))


@pytest.mark.slow
def test_it_trains_and_each_outcome_has_its_numbers(release, tmp_path, monkeypatch):
    monkeypatch.setenv("DROID_ROOT", str(release))
    recipe = ["+recipe=droid_policy", "data=droid_cosmos", "+debug=smoke", f"{DROID}.val_split_ratio=0.3"]
    rows = metrics(train_here([*recipe, *TINY_POLICY], tmp_path / "run"))
    last = rows[max(rows)]
    assert last["Validation/droid/joint/MSE/N"] > 0 and last["Validation/droid_failure/joint/MSE/N"] > 0
    assert last["Validation/MSE"] == pytest.approx(last["Validation/droid/joint/MSE"])
