"""A group that is chosen on the command line beats the recipe, whichever recipe and option they are."""

from __future__ import annotations

from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml

from opentau_train import cli
from tests.nightly import at_night
from tests.program import run

CONF = Path(cli.__file__).parents[1] / "conf"
RECIPES = sorted(file.stem for file in CONF.glob("recipe/*.yaml"))
BUNDLES = ("recipe", "scale", "debug", "experiment", "hparams_search")
GROUPS = {
    str(folder.relative_to(CONF)): sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in [*CONF.glob("*/"), CONF / "data" / "augment"]
    if folder.name not in (*BUNDLES, "simulation") and any(folder.glob("*.yaml"))
}


def said(group: str, option: str) -> dict[str, Any]:
    """What the option's file says itself, values that other keys or the machine decide aside."""
    words = yaml.safe_load((CONF / group / f"{option}.yaml").read_text()) or {}
    settled = {key: value for key, value in words.items() if key != "defaults" and "${" not in str(value)}
    return {key: value for key, value in settled.items() if value not in ("???", {}) and not isinstance(value, dict)}


@cache
def usual(recipe: str) -> dict[str, str]:
    """The option of each group that a recipe has by itself."""
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        return dict(hydra.compose("train", [f"+recipe={recipe}"], return_hydra_config=True).hydra.runtime.choices)


def check(recipe: str, options: dict[str, str]) -> int:
    """Compose with the options; the number of those that aren't the recipe's own, all values of which must be there."""
    # what isn't in the files: finetune=freeze asks for what is frozen
    given = ["finetune.frozen=[stem.*]"] if options.get("finetune") == "freeze" else []
    tree = cli.compose([f"+recipe={recipe}", *(f"{g}={o}" for g, o in options.items()), *given])
    others = {group: option for group, option in options.items() if usual(recipe)[group] != option}
    for group, option in others.items():
        section = tree
        for key in ("data.transforms" if group == "data/augment" else group).split("."):
            section = section.get(key, {})
        own = said(group, option)
        assert {key: section.get(key) for key in own} == own, (recipe, group, option)
    return len(others)


@at_night
@pytest.mark.parametrize(("number", "recipe"), list(enumerate(RECIPES)))
def test_a_chosen_option_has_its_own_values_with_a_recipe(number, recipe):
    assert check(recipe, {group: options[number % len(options)] for group, options in GROUPS.items()}) > 1


@at_night
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_of_every_group_beats_every_recipe(recipe):
    rows = [dict(zip(GROUPS, row, strict=True)) for row in zip_longest(*GROUPS.values())]
    number = sum(check(recipe, {group: option for group, option in row.items() if option is not None}) for row in rows)
    assert number > sum(len(options) - 1 for options in GROUPS.values()) - 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_validation_none_is_no_validation(recipe):
    assert cli.compose([f"+recipe={recipe}", "validation=none"])["validation"]["every"] == 0


def test_an_option_that_a_recipe_has_anyway_keeps_the_recipes_numbers():
    tree, usual = (cli.compose(["+recipe=droid_policy", *more]) for more in (["optimizer=adamw"], []))
    assert tree == usual and usual["optimizer"]["lr"] == 1e-3


def test_values_beat_options_and_the_shown_configuration_is_the_composed_one():
    words = [
        "+recipe=droid_policy",
        "validation=none",
        "validation.batch_size=7",
        "scheduler=wsd",
        "scheduler.decay_steps=9",
    ]
    tree = cli.compose(words)
    assert (tree["validation"]["every"], tree["validation"]["batch_size"]) == (0, 7)
    assert (tree["scheduler"]["warmup_steps"], tree["scheduler"]["decay_steps"]) == (100, 9)
    shown = yaml.safe_load(run([*words, "--cfg", "job", "--resolve"]).stdout)
    assert shown["validation"] == tree["validation"] and shown["scheduler"] == tree["scheduler"]


def test_an_option_of_the_users_own_folder_beats_the_recipe_too(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "rare.yaml").write_text("defaults: [default, _self_]\nevery: 12345\n")
    for words in (["--config-dir", str(tmp_path)], [f'hydra.searchpath=["file://{tmp_path}"]']):
        tree = cli.compose(["+recipe=droid_policy", "validation=rare", *words])
        assert tree["validation"]["every"] == 12345 and tree["validation"]["evaluators"] == ["loss", "action"]


@pytest.mark.parametrize("data", GROUPS["data"])
def test_no_mixture_lifts_the_mode_that_a_recipe_is_named_for(data):
    assert cli.compose(["+recipe=droid_policy", f"data={data}"])["data"]["expect_mode"] == "policy"
