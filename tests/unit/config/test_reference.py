"""`--help` and docs/configuration.md say of every key what it is, what it may be and what it means."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from opentau_train import cli
from opentau_train.config import reference
from opentau_train.config.bounds import Count, Fraction, minimum, within
from opentau_train.config.settings import Settings
from opentau_train.config.typed import build
from opentau_train.errors import UserError
from tests.docs import configuration
from tests.program import environment


def test_the_page_of_the_documentation_is_what_the_settings_say():
    assert configuration.PAGE.read_text() == configuration.page(), "write it: python -m tests.docs.configuration"


OPTIONS = [f"model={file.stem}" for file in sorted((configuration.CONF / "model").glob("*.yaml"))]


@pytest.mark.parametrize(
    "words", [[], *([o] for o in OPTIONS), ["optimizer=muon", "scheduler=wsd", "logger=wandb"]], ids=str
)
def test_every_key_says_what_it_means(words):
    found = configuration.found(*words)
    assert [key.path for key in found if not key.words] == []
    assert len({key.path for key in found}) == len(found) > 140


def test_every_composed_key_is_there():
    found = {key.path for key in configuration.found("+recipe=droid_policy")}

    def leaves(tree, path=""):
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{path}{key}.")
            elif key != "_target_":
                yield f"{path}{key}"

    composed = set(leaves(cli.compose(["+recipe=droid_policy"])))
    assert {path for path in composed if not path.startswith("data.sources.")} - {"optimizer.groups"} <= found
    assert {"data.sources.NAME.root", "data.sources.NAME.tolerance_s", "model.vlm_path"} <= found


def test_values_are_those_of_the_other_arguments():
    values = {key.path: key.value for key in configuration.found("+recipe=droid_policy", "trainer.steps=77")}
    assert values["trainer.steps"] == "77" and values["validation.evaluators"] == "[loss,action]"


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Count, "integer >= 1"),
        (Fraction | None, "number from 0 to below 1, or null"),
        (Annotated[int, within(0, 9)], "integer from 0 to 9"),
        (Annotated[float, minimum(3)], "number >= 3"),
        (Literal["a", "b"], "a|b"),
        (tuple[str, ...], "list of text"),
        (dict[str, int] | list[str], "mapping, or list of text"),
        (bool, "true|false"),
    ],
)
def test_a_type_is_said_in_words(hint, words):
    assert reference.kind(hint) == words


def test_a_fraction_that_is_said_is_held():
    @dataclass(frozen=True)
    class Odd:
        share: Fraction = 0.5

        def check(self, path: str) -> None: ...

    assert [build(Odd, {"share": value}, "odd").share for value in (0.0, 0.99)] == [0.0, 0.99]
    for value in (1.0, -0.1):
        with pytest.raises(UserError, match="in \\[0, 1\\)"):
            build(Odd, {"share": value}, "odd")


def test_help_narrows_to_a_section_or_a_key_and_fits_the_width():
    page = cli.help_page(["data.sources.x"], 70)
    assert "data.sources.NAME.root=null" in page and "trainer" not in page and "Usage" not in page
    assert max(map(len, page.splitlines())) <= 70
    assert cli.help_page(["trainer.steps", "trainer.steps=5"], 100).startswith("trainer.steps=5  [integer >= 1]")
    assert "model.vae_depth" in cli.help_page(["model", "model=act_tiny"], 100)


def test_a_place_that_is_none_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"no key 'trainer.stpes': did you mean 'trainer.steps'"):
        cli.help_page(["trainer.stpes"], 100)
    with pytest.raises(UserError, match=r"no key 'modle': did you mean 'model'"):
        cli.help_page(["modle"], 100)


def test_a_reader_that_leaves_ends_the_help_without_a_word():
    words = f"{sys.executable} -m opentau_train --help | head -n 1"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.stdout.startswith("opentau_train trains") and done.stderr == ""


def test_all_settings_are_walked():
    assert {key.path.partition(".")[0] for key in configuration.found()} == set(Settings.__dataclass_fields__)
