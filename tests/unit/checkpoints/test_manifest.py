"""A checkpoint's files are what was written, or are refused by name; a resume goes back to the newest that are."""

import errno
import json
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.checkpoints import commit, manifest
from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.errors import UserError
from opentau_train.tools import export, verify
from tests.program import TOY, metrics, train_here

SHORT = [*TOY, "logger=none", "validation.every=0", "checkpoint.every=2", "checkpoint.keep_last=null"]
STATE = "state/__0_0.distcp"
MODEL = "pretrained_model/model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_here([*SHORT, "trainer.steps=6"], tmp_path_factory.mktemp("manifest") / "run")


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


def flip(path: Path, place: int | None = None) -> None:
    """Turn one bit over: the file's size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 0x40
    path.write_bytes(content)


def test_every_file_is_listed_with_the_hash_that_xxhash_gives(trained):
    checkpoint = trained / "checkpoints" / "00000006"
    files = {p.relative_to(checkpoint).as_posix(): p for p in checkpoint.rglob("*") if p.is_file()}
    listed = manifest.read(checkpoint)
    assert listed.keys() == files.keys() - {manifest.MANIFEST} and {STATE, MODEL, "run.json"} <= listed.keys()
    for name, file in listed.items():
        content = files[name].read_bytes()
        assert file == (len(content), xxhash.xxh3_128_hexdigest(content))


def test_one_flipped_bit_in_any_file_is_named(run_dir, capsys):
    checkpoint = run_dir / "checkpoints" / "00000004"
    assert verify.main([str(checkpoint)]) == 0 and "as they were written" in capsys.readouterr().out
    for name in manifest.read(checkpoint):
        flip(checkpoint / name)
        assert commit.flaw(checkpoint) is None, "its size tells nothing"
        assert manifest.damage(checkpoint) == f"{name} has other bytes than were written"
        assert verify.main([str(run_dir), str(checkpoint)]) == 2
        assert f"00000004: {name} has other bytes" in capsys.readouterr().out
        flip(checkpoint / name)
    assert manifest.damage(checkpoint) is None


def test_ranks_share_the_files_and_one_of_them_sees_the_damage(run_dir):
    checkpoint = run_dir / "checkpoints" / "00000006"
    for name in manifest.read(checkpoint):
        flip(checkpoint / name)
        seen = [manifest.damage(checkpoint, part=part, parts=3) for part in range(3)]
        assert [why for why in seen if why is not None] == [f"{name} has other bytes than were written"]
        flip(checkpoint / name)


def test_a_resume_goes_back_to_the_newest_undamaged_checkpoint(run_dir, trained):
    """And comes to the same numbers again; what was damaged is kept beside them."""
    checkpoints = run_dir / "checkpoints"
    flip(checkpoints / "00000006" / STATE)
    flip(checkpoints / "00000004" / "state" / ".metadata")
    train_here([*SHORT, "trainer.steps=6", "resume=auto"], run_dir)
    skipped = [line for line in (run_dir / "train.log").read_text().splitlines() if "WARNING skipped" in line]
    assert len(skipped) == 2 and "00000006.damaged" in skipped[0] and ".metadata has other bytes" in skipped[1]
    assert metrics(run_dir)[6]["Training/Loss"] == metrics(trained)[6]["Training/Loss"]
    assert manifest.damage(checkpoints / "00000006") is None and (checkpoints / "00000006.damaged").is_dir()
    again = load_policy(run_dir)
    assert export.predict(again.policy) == export.predict(load_policy(trained).policy)


def test_a_damaged_checkpoint_that_is_named_is_refused_by_all_that_read_it(run_dir, tmp_path, capsys):
    checkpoint = run_dir / "checkpoints" / "00000006"
    flip(checkpoint / MODEL, -8)
    words = [*SHORT, "trainer.steps=8", f"resume={checkpoint}"]
    with pytest.raises(UserError, match=f"the checkpoint is damaged: {MODEL} has other bytes") as refused:
        train_here(words, run_dir)
    assert "resume=auto" in refused.value.remedy
    with pytest.raises(UserError, match="is damaged"):
        load_policy(checkpoint)
    assert export.main([f"checkpoint={checkpoint}", f"out={tmp_path / 'p.safetensors'}"]) == 2
    assert "is damaged" in capsys.readouterr().err
    train_here([*words, "checkpoint.verify=false"], run_dir)  # the shards, which a resume reads, are whole


def test_a_checkpoint_of_an_older_version_is_read_without_hashes(run_dir, capsys):
    checkpoint = run_dir / "checkpoints" / "00000006"
    sizes = {name: file.size for name, file in manifest.read(checkpoint).items()}
    (checkpoint / manifest.MANIFEST).write_text(json.dumps(sizes))
    assert commit.flaw(checkpoint) is None and manifest.damage(checkpoint) is None
    assert verify.main([str(run_dir)]) == 0 and "have no hash" in capsys.readouterr().out
    train_here([*SHORT, "trainer.steps=7", "resume=auto"], run_dir)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(st.binary(max_size=40) | ODD.map(lambda tree: json.dumps(tree).encode()) | st.just(b"[" * 100_000))
def test_whatever_the_manifest_holds_is_no_traceback(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("odd") / "00000001"
    folder.mkdir()
    (folder / manifest.MANIFEST).write_bytes(content)
    assert commit.flaw(folder) is not None


def test_random_damage_of_the_same_size_never_passes(run_dir):
    checkpoint, dice = run_dir / "checkpoints" / "00000006", random.Random(5)
    names = list(manifest.read(checkpoint))
    for _ in range(40):
        name = dice.choice(names)
        path = checkpoint / name
        content = path.read_bytes()
        start = dice.randrange(len(content))
        spoiled = content[:start] + dice.randbytes(min(9, len(content) - start)) + content[start + 9 :]
        path.write_bytes(spoiled)
        assert (manifest.damage(checkpoint) is None) == (spoiled == content), name
        path.write_bytes(content)


def test_what_is_written_may_be_read_by_others(trained, tmp_path):
    """As the umask says, not by its owner alone."""
    out = tmp_path / "policy.safetensors"
    assert export.main([f"checkpoint={trained}", f"out={out}"]) == 0
    (probe := tmp_path / "probe").touch()
    written = [out, *(p for p in trained.rglob("*") if p.is_file() and not p.is_symlink())]
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {oct(probe.stat().st_mode & 0o777)}


def test_what_is_renamed_while_it_is_brought_to_the_disk_is_no_error(tmp_path, monkeypatch):
    """As safetensors does: a file that was listed is gone when it is opened."""
    real = manifest.flush

    def after_the_rename(path):
        if path.name == "weights.part":
            path.rename(tmp_path / "weights")
        real(path)

    monkeypatch.setattr(manifest, "FLUSH_EVERY", 0.0)
    monkeypatch.setattr(manifest, "flush", after_the_rename)
    with manifest.flushing(tmp_path, "*"):
        (tmp_path / "weights.part").write_bytes(b"abc")
        until = time.monotonic() + 20
        while not (tmp_path / "weights").exists():
            assert time.monotonic() < until
    assert (tmp_path / "weights").read_bytes() == b"abc"


def test_a_write_that_fails_beside_is_told(tmp_path, monkeypatch):
    """The system reports it once only: what comes after would not hear of it."""
    (tmp_path / "weights").write_bytes(b"abc")
    told = threading.Event()

    def fails(path):
        told.set()
        raise OSError(errno.EIO, "the disk")

    monkeypatch.setattr(manifest, "FLUSH_EVERY", 0.0)
    monkeypatch.setattr(manifest, "flush", fails)
    with pytest.raises(OSError, match="the disk"), manifest.flushing(tmp_path, "*"):
        assert told.wait(20)
