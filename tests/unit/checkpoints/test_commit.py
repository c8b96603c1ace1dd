"""The commit protocol: killed at any file operation, a whole newest checkpoint is there, never half a one."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opentau_train.checkpoints import commit
from opentau_train.checkpoints.commit import Retention
from opentau_train.errors import UserError
from tests.nightly import by_day


def write(folder: Path, step: int) -> Path:
    """An unsealed checkpoint as the ranks leave it."""
    partial = folder / f"{step:08d}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "state").mkdir(parents=True)
    (partial / "state" / "shard").write_bytes(bytes(step % 7 + 1))
    (partial / "run.json").write_text(json.dumps({"step": step}))
    return partial


def save(folder: Path, step: int, retention: Retention = Retention()) -> Path:  # noqa: B008 (frozen)
    partial = write(folder, step)
    commit.seal(partial)
    commit.sweep(commit.publish(partial, retention))
    return partial.with_suffix("")


def names(folder: Path) -> list[int]:
    return [int(p.name) for p in commit.complete(folder)]


OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree")


def killed(work: Callable[[], object], operation: int) -> bool:
    """Do `work` in a child that is killed (-9) before its file operation number `operation`; False when it got to the
    end first."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            if event in OPERATIONS:
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(hook)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.distributed
def test_killed_at_any_file_operation_the_newest_is_whole_and_found(tmp_path):
    retention = Retention(keep_last=2)
    kills, seen = 0, set()
    while True:
        folder = tmp_path / str(kills)
        for step in (1, 2, 3):
            save(folder, step, retention)
            commit.point(folder / "best", "00000001")
        write(folder, 4)  # an earlier kill's
        was_killed = killed(lambda: save(folder, 5, retention), kills)  # noqa: B023 (made and done here)
        found = names(folder)
        seen.add(tuple(found))
        assert found[-1] in (3, 5) and set(found) <= {1, 2, 3, 5}
        assert {1, 3} <= set(found) and (5 in found or 2 in found), "pruned before the new one was there"
        last = (folder / "last").resolve()
        assert commit.flaw(last) is None and int(last.name) in (3, 5)
        # and the next save, after any of these kills, ends in the one right state
        save(folder, 6, retention)
        assert names(folder)[-1] == 6 and (folder / "last").resolve().name == "00000006"
        assert not list(folder.glob("*.tmp"))
        if not was_killed:
            break
        kills += 1
    assert kills > 20 and {(1, 2, 3), (1, 3, 5)} <= seen and names(folder) == [1, 5, 6]


def torn(folder: Path) -> None:
    (folder / "00000003" / "state" / "shard").unlink()


BEFORE: dict[str, Callable[[Path], object]] = {"whole": lambda folder: None, "torn": torn}


def test_a_step_that_is_whole_is_not_written_over(tmp_path):
    """A reader may have it open, and nothing is gained: the same step has the same bytes."""
    first = save(tmp_path, 3)
    inode, bytes_ = first.stat().st_ino, (first / "state" / "shard").read_bytes()
    partial = write(tmp_path, 3)
    (partial / "state" / "shard").write_bytes(b"of another save of the step")
    commit.seal(partial)
    commit.sweep(commit.publish(partial, Retention()))
    assert (first.stat().st_ino, (first / "state" / "shard").read_bytes()) == (inode, bytes_)
    assert commit.flaw(first) is None and not partial.exists() and (tmp_path / "last").resolve() == first


@pytest.mark.distributed
@pytest.mark.parametrize("keep_last", by_day([1, 2], 1))
@pytest.mark.parametrize("state", BEFORE)
def test_a_step_saved_again_never_takes_away_the_last_whole_checkpoint(state, keep_last, tmp_path):
    """With keep_last=1 the one that is saved again is all there is."""
    retention, kills = Retention(keep_last=keep_last), 0
    while True:
        folder = tmp_path / str(kills) / "checkpoints"
        for step in (3,) if state == "whole" and keep_last == 1 else (2, 3):
            save(folder, step, Retention(keep_last=2))
        BEFORE[state](folder)
        was_killed = killed(lambda: save(folder, 3, retention), kills)  # noqa: B023 (made and done here)
        found = commit.resolve("auto", tmp_path / str(kills))
        assert found is not None and commit.flaw(found) is None
        assert found.name == "00000003" or state == "torn"
        save(folder, 4, retention)
        assert commit.resolve("auto", tmp_path / str(kills)).name == "00000004" and not list(folder.glob("*.tmp"))
        if not was_killed:
            break
        kills += 1
    assert kills > 10


@pytest.mark.distributed
def test_a_file_is_amended_in_a_checkpoint_that_stays_whole(tmp_path):
    texts, kills = {json.dumps({"step": 3}), '{"step": 3, "more": 1}'}, 0
    while True:
        path = save(tmp_path / str(kills), 3)
        was_killed = killed(lambda: commit.amend(path, "run.json", '{"step": 3, "more": 1}'), kills)  # noqa: B023
        assert commit.flaw(path) is None and (path / "run.json").read_text() in texts
        if not was_killed:
            break
        kills += 1
    assert kills >= 6 and "more" in (path / "run.json").read_text()
    (path / "run.json").write_text("{}")
    assert "run.json has 2 bytes of 22" in commit.flaw(path)


@pytest.mark.distributed
@given(data=st.data(), keep_last=st.integers(1, 3), keep_every=st.none() | st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_through_any_saves_and_kills_the_newest_never_gets_older(data, keep_last, keep_every, tmp_path_factory):
    """Steps only ever go on from the newest whole checkpoint, as a resumed run's do."""
    run_dir, retention, at = tmp_path_factory.mktemp("run"), Retention(keep_last, keep_every), 0
    for _ in range(data.draw(st.integers(1, 6), label="saves")):
        step = at + data.draw(st.integers(0 if at else 1, 2), label="steps")  # 0: stopped where it was resumed
        operation = data.draw(st.integers(0, 40), label="killed before")
        finished = not killed(lambda: save(run_dir / "checkpoints", step, retention), operation)  # noqa: B023
        newest = commit.resolve("auto", run_dir)
        assert newest is not None or at == 0
        reached = int(newest.name) if newest else 0
        assert at <= reached <= step and (reached == step or not finished)
        at = reached


@given(
    steps=st.sets(st.integers(1, 10**7), max_size=12),
    keep_last=st.none() | st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 5000),
)
@settings(deadline=None)
def test_retention_keeps_the_newest_and_the_multiples(steps, keep_last, keep_every):
    all_names = [f"{s:08d}" for s in steps]
    gone = Retention(keep_last, keep_every).obsolete(all_names)
    kept = set(steps) - {int(n) for n in gone}
    newest = sorted(steps)[-keep_last:] if keep_last else sorted(steps)
    multiples = {s for s in steps if keep_every and s % keep_every == 0}
    assert kept == set(newest) | multiples
    assert gone == sorted(gone)


TORN = {
    "truncated": lambda path: (path / "state" / "shard").write_bytes(b""),
    "a file lost": lambda path: (path / "state" / "shard").unlink(),
    "no manifest": lambda path: (path / "files.json").unlink(),
    "a torn manifest": lambda path: (path / "files.json").write_text('{"state/sh'),
    "not renamed": lambda path: path.rename(path.with_name(path.name + ".tmp")),
}


@pytest.mark.parametrize("damage", TORN)
def test_auto_skips_what_is_not_whole_and_says_what(damage, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    save(folder, 3)
    torn = save(folder, 6)
    TORN[damage](torn)
    with caplog.at_level("WARNING", logger="opentau_train"):
        assert commit.resolve("auto", tmp_path).name == "00000003"
    assert len(caplog.records) == 1 and "skipped" in caplog.text and "00000006" in caplog.text
    assert ("rename it to 00000006" in caplog.text) == (damage == "not renamed")  # all of it is there
    if torn.exists():
        with pytest.raises(UserError, match=r"not whole|no complete"):
            commit.resolve(str(torn), None)
    save(folder, 6)  # training comes to the step again
    assert names(folder) == [3, 6] and commit.flaw(torn) is None


def test_what_was_sealed_before_a_kill_is_taken_up_and_nothing_else(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    commit.take_up(folder)  # there is none yet
    save(folder, 3)
    for step in (2, 6, 9):
        partial = write(folder, step)
        if step != 9:
            commit.seal(partial)
    (folder / "00000006.tmp").rename(folder / "00000006.old.tmp")
    (folder / "00000012").mkdir()  # torn, and sealed once more
    commit.take_up(folder)
    assert names(folder) == [3] and not caplog.records
    commit.seal(write(folder, 12))
    commit.seal(write(folder, 11))
    commit.take_up(folder)
    assert names(folder) == [3, 12] and (folder / "last").resolve().name == "00000012"
    assert commit.flaw(folder / "00000012") is None and "00000012 was written when" in caplog.text
    save(folder, 15)
    assert names(folder) == [3, 12, 15] and not list(folder.glob("*.tmp"))


@pytest.mark.distributed
def test_killed_while_it_takes_up_a_checkpoint_the_next_one_does(tmp_path):
    for operation in range(20):
        folder = tmp_path / str(operation)
        save(folder, 3)
        commit.seal(write(folder, 6))
        again = killed(lambda: commit.take_up(folder), operation)  # noqa: B023 (made and done here)
        commit.take_up(folder)
        assert names(folder) == [3, 6]
        if not again:
            break
    assert operation > 2 and not again


def test_a_whole_folder_is_resumed_without_a_word(tmp_path, caplog):
    save(tmp_path / "checkpoints", 3)
    (tmp_path / "checkpoints" / "00000002.tmp").mkdir()  # older than what is resumed: no progress is lost with it
    assert commit.resolve("auto", tmp_path).name == "00000003" and not caplog.records


def test_a_run_is_never_written_over_by_a_branch_of_its_past(tmp_path):
    first, _ = save(tmp_path / "checkpoints", 3), save(tmp_path / "checkpoints", 6)
    for run_dir in (None, tmp_path):
        with pytest.raises(UserError, match="already has a checkpoint of step 6"):
            commit.resolve(str(first), run_dir)
        assert commit.resolve(str(tmp_path), run_dir).name == "00000006"
    with pytest.raises(UserError, match="already has a checkpoint of step 6"):
        commit.resolve("never", tmp_path)
    assert commit.resolve(str(first), tmp_path / "branch") == first.resolve()
    assert commit.resolve(str(tmp_path / "checkpoints" / "last"), tmp_path / "branch").name == "00000006"
    assert commit.resolve("never", tmp_path / "branch") is None and commit.resolve("auto", tmp_path / "branch") is None
