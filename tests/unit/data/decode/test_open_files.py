"""One limit of open files, many owners: whoever opens makes room, and what is read stays the same."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.data.decode.open_files import OpenFiles, few_files_left
from tests.limits import alone, no_room, num_open, room_for


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / str(i) for i in range(40)]
    for path in paths:
        path.write_text(path.name)
    return paths


@alone
def test_owners_stay_below_the_limit_and_close_what_was_used_least_recently(files):
    @given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 19)), min_size=1, max_size=60))
    def check(uses):
        owners = [OpenFiles(open, capacity) for capacity in (3, 20, 20)]
        recent: list[tuple[int, int]] = []
        for owner, number in uses:
            file = owners[owner].get(files[number])
            file.seek(0)
            assert file.read() == files[number].name
            recent = [(owner, number), *(use for use in recent if use != (owner, number))]
            first = [use for use in recent if use[0] == 0]
            kept = [use for use in recent if use[0] != 0 or use in first[:3]]
            assert [use for use in kept if files[use[1]] in owners[use[0]]._files] == kept[: limit - before]
            assert sum(map(len, owners)) == num_open() - before <= limit - before
        for owner in owners:
            owner.shrink(0)

    with room_for(8) as limit:
        before = num_open()
        check()


@alone
def test_without_a_limit_near_each_owner_keeps_as_many_as_it_may(files):
    before = num_open()
    owner = OpenFiles(open, 30)
    for path in files:
        owner.get(path)
    assert (len(owner), num_open()) == (30, before + 30)
    owner.drop(files[-1])
    owner.drop(files[0])
    assert len(owner) == 29
    owner.shrink(0)
    assert num_open() == before


@alone
def test_all_descriptors_taken_by_others_is_few_left_and_opening_says_so(files):
    with no_room():
        assert few_files_left()
        with pytest.raises(OSError) as refused:
            OpenFiles(open, 5).get(files[0])
    assert refused.value.errno == errno.EMFILE
    assert not few_files_left()


@alone
def test_one_that_reads_apart_makes_room_by_its_own_files_and_keeps_them_from_others(files):
    with room_for(8) as limit:
        before = num_open()
        apart, others = OpenFiles(open, 20, apart=True), [OpenFiles(open, 20), OpenFiles(open, 20)]
        kept = [apart.get(path) for path in files[:3]]
        for owner in others:
            for path in files[10:20]:
                owner.get(path)
        assert len(apart) == 3 and not any(file.closed for file in kept)
        assert sum(map(len, others)) == limit - before - 3
        for path in files[3:6]:
            apart.get(path)
        assert sum(map(len, others)) == limit - before - 3
        for owner in (apart, *others):
            owner.shrink(0)
