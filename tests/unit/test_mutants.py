"""The list of mutants fits the program as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

import opentau_train
from tests.mutants.__main__ import REPO, ROOMS
from tests.mutants.listed import MUTANTS

PACKAGE = Path(opentau_train.__file__).parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.name}")
def test_each_changes_one_place_of_a_module_that_still_compiles(mutant):
    text = (PACKAGE / mutant.file).read_text()
    assert text.count(mutant.before) == 1
    changed = text.replace(mutant.before, mutant.after)
    assert changed != text
    compile(changed, mutant.file, "exec")


def test_there_are_enough_and_each_has_tests_of_its_room():
    assert len(MUTANTS) >= 60 and len({(m.file, m.name) for m in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        rooms = [tests for place, tests in ROOMS.items() if mutant.file.startswith(place)]
        assert len(rooms) == 1 and any((REPO / test).exists() for test in rooms[0])
