"""A DROID-shaped dataset without language columns trains on its tasks, and the start says so."""

import json

import pytest

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.data.mixture import open as mixture
from opentau_train.errors import UserError
from opentau_train.types import WindowSpec
from tests.droid_datasets import LANGUAGE, write_droid
from tests.lerobot_writer import task_text


def open_droid(root, *overrides: str):
    """The recipe's own source."""
    settings = load_settings(cli.compose(["data=droid", f"data.sources.droid.root={root}", *overrides]))
    return mixture.open_source("droid", settings.data.sources["droid"])


def prompts(source, episode: int):
    return source.cursors(WindowSpec(1)).cursor().read(episode, 0).prompts


def test_without_language_columns_the_tasks_are_the_prompts_and_it_says_so(tmp_path, caplog):
    source = open_droid(write_droid(tmp_path / "set", ()))
    assert [prompts(source, e) for e in range(2)] == [(task_text(0),), (task_text(1),)]
    warned = [r.getMessage() for r in caplog.records if "prompt_columns" in r.getMessage()]
    assert len(warned) == 1 and warned[0].endswith("prompts: the dataset's tasks") and LANGUAGE[2] in warned[0]


def test_with_all_of_them_nothing_is_said(tmp_path, caplog):
    source = open_droid(write_droid(tmp_path / "set"))
    assert prompts(source, 1) == tuple(f"{name} of 1" for name in LANGUAGE) and not caplog.records


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Of the language columns the first, and one of another name."""
    return write_droid(tmp_path_factory.mktemp("few") / "set", (LANGUAGE[0], "language_instruction_too"))


def test_those_that_are_there_are_read_and_a_near_name_is_shown(few, caplog):
    assert prompts(open_droid(few), 1) == ("language_instruction of 1",)
    assert "there is no language_instruction_2, language_instruction_3: did you mean" in caplog.text


def test_columns_that_are_named_without_the_option_must_be_there(few):
    with pytest.raises(UserError, match="'language_instruction_2' is not in the dataset"):
        open_droid(few, "data.sources.droid.optional_prompts=false")


def test_without_tasks_either_it_is_an_error(tmp_path):
    info = write_droid(tmp_path / "set", ()) / "meta" / "info.json"
    tree = json.loads(info.read_text())
    del tree["features"]["task_index"]
    info.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="'language_instruction' is not in the dataset"):
        open_droid(tmp_path / "set")
