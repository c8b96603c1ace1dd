"""Where a run without a directory of its own goes, and which run `resume=auto` goes on with."""

from __future__ import annotations

import os
import re

import pytest
import yaml

from opentau_train.checkpoints import commit, place
from opentau_train.composing import compose
from opentau_train.config.settings import load_settings
from tests.unit.checkpoints.test_commit import save, write

MAIN = {"main": "my_set"}


def saved(root, name, seconds, sources=None):
    """A run with a checkpoint that was written at `seconds`, of `sources` {name: settings} (None: it says nothing)."""
    run = root / name
    path = save(run / "checkpoints", 1)
    os.utime(path, (seconds, seconds))
    if sources is not None:
        (run / "config.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}}))
    return run


def test_only_a_run_that_goes_on_takes_up_what_was_written_before_a_kill(tmp_path):
    save(tmp_path / "checkpoints", 1)
    commit.seal(write(tmp_path / "checkpoints", 2))
    assert place._found(str(tmp_path), tmp_path).name == "00000001"
    assert place._found("auto", tmp_path).name == "00000002"


def test_the_run_saved_last_is_the_newest(tmp_path):
    for number, name in enumerate(("toy-1", "toy-2", "other-3")):
        saved(tmp_path, name, number, {"main": {"root": "/data/my_set"}})
    assert place.newest_run(tmp_path, "toy", MAIN).name == "toy-2"
    assert place.newest_run(tmp_path, "none", MAIN) is None


def test_runs_of_other_data_are_passed_over_and_told(tmp_path, caplog):
    own = saved(tmp_path, "toy-1", 1, {"main": {"root": "/moved/to/my_set"}})
    saved(tmp_path, "toy-other_set-2", 2, {"main": {"root": "/data/other_set"}})
    newest = saved(
        tmp_path, "toy-my_set+more-3", 3, {"main": {"root": "/data/my_set"}, "more": {"repo_id": "lab/more"}}
    )
    assert place.newest_run(tmp_path, "toy", MAIN) == own
    assert f"{newest} (main: my_set, more: more) and 1 older" in caplog.text
    caplog.clear()
    assert place.newest_run(tmp_path, "toy", {"main": "my_set", "more": "more"}) == newest and not caplog.text
    assert place.newest_run(tmp_path, "toy", {"main": "a third"}) is None
    assert place.newest_run(tmp_path, "toy", MAIN, restart=True) == newest


@pytest.mark.parametrize("text", [None, "garbled: [", "name: toy", "data: {sources: {main: 3}}"])
def test_a_run_that_does_not_say_of_which_data_it_is_is_passed_over(tmp_path, caplog, text):
    run = saved(tmp_path, "toy-1", 1)
    if text is not None:
        (run / "config.yaml").write_text(text)
    assert place.newest_run(tmp_path, "toy", MAIN) is None
    assert "config.yaml names none" in caplog.text


@pytest.mark.parametrize(
    ("sources", "label"),
    [
        (["main.root=/data/my_set"], "my_set"),
        (["main.repo_id=lab/pusht", "old.root='s3://bucket/two words/'"], "pusht+two_words"),
        (["main.root=/data/" + "x" * 60], "x" * 40),
    ],
)
def test_a_new_run_is_named_after_its_datasets(tmp_path, sources, label):
    words = ["+recipe=lerobot", f"paths.root={tmp_path}", *(f"data.sources.{source}" for source in sources)]
    name = place.run_dir_of(load_settings(compose(words))).name
    assert re.fullmatch(rf"lerobot-{re.escape(label)}-\d{{8}}-\d{{6}}", name), name


def test_a_source_without_a_place_names_the_run_itself(tmp_path):
    settings = load_settings(compose(["+recipe=droid_policy", f"paths.root={tmp_path}"]))
    assert place.run_dir_of(settings).name.startswith("droid_policy-droid-")
