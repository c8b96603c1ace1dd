"""Datasets read from servers of this machine: the same windows as from the disk, each byte once, through faults."""

import contextlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.data.load import fetching
from opentau_train.data.load.stream import training_batches
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.open import open_mixture
from opentau_train.data.remote import server
from opentau_train.data.remote.cache import Cache
from opentau_train.data.remote.mirror import mirror_at
from opentau_train.errors import Fault, UserError
from opentau_train.types import RawWindow, WindowSpec
from tests import lerobot_writer
from tests.droid_datasets import write_cosmos
from tests.lerobot_writer import Camera
from tests.nightly import at_night
from tests.object_server import Proxy, object_server, proxy_to, running, upload
from tests.program import TINY_POLICY, metrics, train_here

SUCCESS_ONLY = "data.sources.main.success_only=true"
LENGTHS = (11, 7, 13, 9, 5, 12, 8, 6)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A dataset of 4 files of rows and 8 of video."""
    cameras = {"observation.images.front": Camera(episodes_per_file=1)}
    dataset = lerobot_writer.Dataset(lengths=LENGTHS, cameras=cameras, episodes_per_data_file=2)
    return lerobot_writer.write(tmp_path_factory.mktemp("local") / "set", dataset)


@pytest.fixture(scope="module")
def here(local, tmp_path_factory) -> Mixture:
    """The local dataset's mixture."""
    return mixture_of(local, tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def local_windows(here) -> list[RawWindow]:
    return list(windows(here))


@pytest.fixture(scope="module")
def s3(local):
    with object_server() as proxy:
        upload(proxy, local, "set")
        yield proxy


@pytest.fixture
def proxy(s3, monkeypatch) -> Proxy:
    monkeypatch.setattr(server, "DELAYS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own, which take half a minute
    s3.reset()
    return s3


def arguments(root: str | Path, tmp_path: Path, *more: str) -> list[str]:
    given = ["+recipe=lerobot", f"data.sources.main.root={root}", f"paths.cache_dir={tmp_path / 'cache'}"]
    return [*given, "data.num_workers=0", "data.sources.main.val_split_ratio=0.2", *TINY_POLICY, *more]


def mixture_of(root: str | Path, tmp_path: Path, *more: str) -> Mixture:
    return open_mixture(load_settings(cli.compose(arguments(root, tmp_path, *more))))


def windows(mixture: Mixture):
    """Every window of the one dataset, in the order of its files."""
    source = mixture.datasets[0].source
    with contextlib.closing(source.cursors(WindowSpec(4, history=1))) as cursors:
        cursor = cursors.cursor()
        for episode, length in enumerate(source.episodes.length.tolist()):
            for frame in range(length):
                yield cursor.read(episode, frame)


def assert_gives(mixture: Mixture, expected: list[RawWindow]) -> None:
    assert len(expected) == sum(LENGTHS)
    for left, right in zip(expected, windows(mixture), strict=True):
        assert np.array_equal(left.state, right.state) and np.array_equal(left.actions, right.actions)
        assert left.prompts == right.prompts
        assert left.images.keys() == right.images.keys() and len(left.images)
        assert all(np.array_equal(left.images[c], right.images[c]) for c in left.images)


def batches(mixture: Mixture, tmp_path: Path, steps: int = 24) -> list:
    stream = training_batches(
        mixture, mixture.tape(4), rank=0, size=1, first_step=0, last_step=steps, quarantine=tmp_path / "q.jsonl"
    )
    with contextlib.closing(stream):
        return list(stream)


def sizes(root: Path) -> dict[str, int]:
    files = (p for part in ("data", "videos") for p in (root / part).rglob("*") if p.is_file())
    return {f"/bucket/set/{p.relative_to(root).as_posix()}": p.stat().st_size for p in files}


def cached_bytes(tmp_path: Path) -> int:
    files = (tmp_path / "cache" / "remote").rglob("*")
    return sum(p.stat().st_size for p in files if p.is_file() and p.name != ".ledger")


@pytest.mark.slow
def test_windows_and_fingerprint_are_those_of_the_local_copy(here, local_windows, proxy, tmp_path):
    there = mixture_of("s3://bucket/set", tmp_path)
    assert_gives(there, local_windows)
    assert here.datasets[0].source.fingerprint == there.datasets[0].source.fingerprint
    assert {h: s.to_json() for h, s in here.stats.items()} == {h: s.to_json() for h, s in there.stats.items()}


@pytest.mark.slow
def test_metadata_come_at_once_and_video_when_it_is_read(proxy, tmp_path):
    mixture = mixture_of("s3://bucket/set", tmp_path)
    assert not [path for path in proxy.served if "/videos/" in path]
    next(windows(mixture))
    assert len([path for path in proxy.served if "/videos/" in path]) == 1


@pytest.mark.slow
def test_each_byte_is_read_once_however_many_processes_and_runs(local, proxy, tmp_path):
    for workers in (2, 0):
        mixture = mixture_of("s3://bucket/set", tmp_path, f"data.num_workers={workers}", "validation=none")
        assert all(part.error is None for part in batches(mixture, tmp_path))
    list(windows(mixture))
    assert proxy.data_bytes() == sizes(local)


@pytest.mark.slow
def test_files_are_fetched_before_the_lanes_that_read_them_come_to_them(proxy, tmp_path, monkeypatch):
    mixture = mixture_of("s3://bucket/set", tmp_path)
    stream = training_batches(
        mixture, mixture.tape(4), rank=0, size=1, first_step=0, last_step=40, quarantine=tmp_path / "q.jsonl"
    )
    mirror = mirror_at(Path(mixture.datasets[0].settings.root))
    with contextlib.closing(stream):
        next(stream)
        steps = mixture.tape(4).owned(range(fetching.STEPS_AHEAD), 0, 1, 0, 1)
        source = mixture.datasets[0].source
        coming = {path for step in steps for e in step.episode.tolist() for path in source.files(e)}
        end = time.monotonic() + 30
        while (missing := [p for p in coming if not p.exists()]) and time.monotonic() < end:
            time.sleep(0.02)
        assert len(coming) > 4 and not missing
        proxy.fault = lambda path, number: "error"  # nothing more is asked for
        assert all(part.error is None for part in stream)
    assert mirror is not None and mirror.cache.capacity == 100 * 10**9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["error", "cut"])
def test_a_request_that_fails_is_made_again(local, local_windows, proxy, tmp_path, kind):
    proxy.fault = lambda path, number: kind if number == 1 and "/set/" in path else None
    assert_gives(mixture_of("s3://bucket/set", tmp_path), local_windows)
    assert proxy.data_bytes() == sizes(local)
    assert max(proxy.asked.values()) > 1


@at_night
def test_a_slow_server_gives_the_same(local_windows, proxy, tmp_path):
    proxy.delay_s = 0.1
    assert_gives(mixture_of("s3://bucket/set", tmp_path), local_windows)


@pytest.mark.slow
def test_a_server_that_is_gone_ends_the_stream_with_a_fault_and_quarantines_nothing(proxy, tmp_path, caplog):
    mixture = mixture_of("s3://bucket/set", tmp_path)
    proxy.fault = lambda path, number: "error"
    last = batches(mixture, tmp_path)[-1]
    assert isinstance(last.error, Fault)
    assert "s3://bucket/set/videos/" in last.error.what and "tried 4 times" in last.error.what
    assert "resume=auto" in last.error.remedy
    assert "trying again in" in caplog.text
    assert not (tmp_path / "q.jsonl").exists()


@pytest.mark.slow
def test_a_file_that_the_server_has_not_is_a_bad_sample_that_names_it(local, proxy, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(local, root)
    shutil.rmtree(root / "videos/observation.images.front/chunk-000")
    (root / "videos/observation.images.front/chunk-000").mkdir()
    name = "file-003.mp4"
    for number in {"file-000.mp4", "file-001.mp4", "file-002.mp4", name} - {name}:
        relative = f"videos/observation.images.front/chunk-000/{number}"
        shutil.copy(local / relative, root / relative)
    mixture = mixture_of(upload(proxy, root, "partly"), tmp_path, "data.sources.main.episodes=[0,1,2,3]")
    parts = batches(mixture, tmp_path, steps=8)
    assert sum(part.num_substituted for part in parts) > 0 and parts[-1].error is None
    causes = {json.loads(line)["cause"] for line in (tmp_path / "q.jsonl").read_text().splitlines()}
    assert all(name in cause and "the server has no such file" in cause for cause in causes)


@pytest.mark.slow
def test_a_cache_smaller_than_the_dataset_is_kept_to_and_gives_the_same_batches(local, proxy, tmp_path):
    here = mixture_of(local, tmp_path)  # the cache knows the keyframes then
    metadata = sum(p.stat().st_size for p in (local / "meta").rglob("*") if p.is_file())
    room = metadata + 2000 + sum(sizes(local).values()) // 2
    mixture = mixture_of("s3://bucket/set", tmp_path, f"data.cache_gb={room / 1e9:.9f}")
    for left, right in zip(batches(here, tmp_path), batches(mixture, tmp_path), strict=True):
        assert right.error is None
        assert torch.equal(left.batch.actions, right.batch.actions)
        assert all(torch.equal(left.batch.images[c], right.batch.images[c]) for c in left.batch.images)
    assert cached_bytes(tmp_path) <= room
    assert sum(proxy.data_bytes().values()) > sum(sizes(local).values())  # some were fetched again


@pytest.mark.slow
def test_a_file_that_was_evicted_is_fetched_again_when_it_is_opened_again(proxy, tmp_path):
    mixture = mixture_of("s3://bucket/set", tmp_path)
    source = mixture.datasets[0].source
    with contextlib.closing(source.cursors(WindowSpec(4))) as cursors:
        cursor = cursors.cursor()
        before = cursor.read(0, 0)
        for path in source.files(0):
            path.unlink()
        assert np.array_equal(cursor.read(0, 1).images["front"].shape, before.images["front"].shape)  # still open
        cursors.pool.drop(source.files(0)[1])
        again = cursor.read(0, 0)
    assert np.array_equal(again.images["front"], before.images["front"])


@pytest.mark.slow
def test_a_file_that_does_not_fit_names_the_setting_and_a_size_that_works(local, proxy, tmp_path):
    metadata = sum(p.stat().st_size for p in (local / "meta").rglob("*") if p.is_file())
    with pytest.raises(UserError) as caught:
        list(windows(mixture_of("s3://bucket/set", tmp_path, f"data.cache_gb={(metadata + 2000) / 1e9:.9f}")))
    assert caught.value.where == "data.cache_gb"
    size = caught.value.remedy.removeprefix("set data.cache_gb=").split()[0]
    mixture = mixture_of("s3://bucket/set", tmp_path, f"data.cache_gb={size}")
    assert len(list(windows(mixture))) == sum(LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("s3://bucket/nothing", "s3://bucket/nothing lists no files"),
        ("s3://no_such_bucket/set", "lists no files"),
        ("nonsense://bucket/set", "nonsense"),
        ("file:///no/such/directory", "lists no files"),
    ],
)
def test_a_wrong_url_is_the_users_mistake(proxy, tmp_path, root, words):
    with pytest.raises(UserError) as caught:
        mixture_of(root, tmp_path)
    assert words in caught.value.what and caught.value.remedy
    assert caught.value.where == "data.sources.main.root"


@pytest.mark.slow
def test_a_server_that_does_not_answer_at_the_start_is_named_with_its_key(proxy, tmp_path):
    proxy.fault = lambda path, number: "error"
    with pytest.raises(UserError) as caught:
        mixture_of("s3://bucket/set", tmp_path)
    assert caught.value.where == "data.sources.main.root" and "s3://bucket/set" in caught.value.what


@pytest.mark.slow
def test_a_dataset_that_was_changed_on_the_server_is_read_anew(local, proxy, tmp_path):
    first = mixture_of("s3://bucket/set", tmp_path)
    list(windows(first))
    other = lerobot_writer.write(
        tmp_path / "other", lerobot_writer.Dataset(lengths=LENGTHS, columns={"action": lerobot_writer.vector(3, 7.0)})
    )
    url = upload(proxy, local, "changing")
    before = mixture_of(url, tmp_path)
    upload(proxy, other, "changing")
    after = mixture_of(url, tmp_path)
    assert before.datasets[0].source.fingerprint == first.datasets[0].source.fingerprint
    assert after.datasets[0].source.fingerprint != before.datasets[0].source.fingerprint
    assert next(windows(after)).actions[0, 0] == 7.0


@pytest.mark.slow
def test_a_plain_web_server_without_ranges_is_read_through_its_pages(local, local_windows, tmp_path):
    with running(["-m", "http.server", "-b", "127.0.0.1"], cwd=local.parent) as port, proxy_to(port) as proxy:
        assert_gives(mixture_of(f"{proxy.url}/set", tmp_path), local_windows)
        assert sorted(proxy.data_bytes().values()) == sorted(sizes(local).values())


@pytest.mark.slow
def test_datasets_by_outcome_are_found_on_the_server(proxy, tmp_path):
    write_cosmos(tmp_path / "release" / "success")
    write_cosmos(tmp_path / "release" / "failure", "failure", (20, 22, 24))
    upload(proxy, tmp_path / "release", "release")
    split = ["data.sources.main.val_split_ratio=0.3"]
    whole, good = (mixture_of("s3://bucket/release/", tmp_path, *split, *more) for more in ((), (SUCCESS_ONLY,)))
    assert [d.name for d in whole.datasets] == ["main", "main_failure"]
    assert [len(d.source.episodes) for d in whole.datasets] == [4, 3] and [d.name for d in good.datasets] == ["main"]
    for dataset in whole.datasets:
        folder = tmp_path / "release" / ("failure" if "failure" in dataset.name else "success")
        (alone,) = mixture_of(folder, tmp_path, *split).datasets
        assert dataset.source.fingerprint == alone.source.fingerprint
    assert len(list(windows(whole))) > 0


@pytest.mark.slow
def test_a_run_that_began_on_the_disk_goes_on_from_a_url(local, proxy, tmp_path, capsys):
    given = [a for a in arguments(local, tmp_path, "trainer.global_batch_size=4") if not a.startswith("paths.")]
    train_here([*given, "trainer.steps=2"], tmp_path / "run")
    there = [*given, "data.sources.main.root=s3://bucket/set", "trainer.steps=3", "resume=auto"]
    train_here(there, tmp_path / "run")
    log = capsys.readouterr().err
    assert "resumed from" in log and "data plan has changed" not in log
    assert max(metrics(tmp_path / "run")) == 3


def test_other_classes_get_the_url_as_it_was_given(tmp_path):
    from opentau_train.config.data import SourceSettings
    from opentau_train.data.mixture import resolve

    settings = load_settings(cli.compose(arguments(tmp_path, tmp_path)))
    source = SourceSettings(target="tests.fake_source.FakeSource", root="s3://bucket/x")
    assert resolve._with_root("x", source, settings, resolve.alone).root == "s3://bucket/x"


@pytest.mark.slow
def test_the_cache_keeps_what_a_run_with_less_room_leaves(proxy, tmp_path):
    mixture = mixture_of("s3://bucket/set", tmp_path)
    list(windows(mixture))
    cache = Cache(tmp_path / "cache" / "remote")
    assert cache.capacity == 100 * 10**9
    mixture_of("s3://bucket/set", tmp_path, "data.cache_gb=50")
    assert cache.capacity == 50 * 10**9
