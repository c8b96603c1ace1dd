"""What breaks while a run is on: killed workers, damaged files, changed data. A clear end or a way on."""

import json
import os
import shutil
import signal
import time

import pytest

from opentau_train.errors import EXIT_FAULT, EXIT_USER
from tests.lerobot_writer import Camera, Dataset, write
from tests.nightly import by_day
from tests.program import TOY, children, metrics, ranks_of, run, start, train_here

pytestmark = [pytest.mark.distributed, pytest.mark.timed]

QUICK = [*TOY, "validation.every=0", "logger=none"]


def workers_of(pid):
    """Process ids of the loader workers of a rank."""
    return [child for name, child in children(pid).items() if name.startswith("pt_data_worker")]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("the run did not get there in time: " + process.communicate()[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_worker_ends_the_run_with_a_clear_message_and_no_hang(ranks, tmp_path):
    command = [
        *QUICK,
        "trainer.steps=100000",
        "data.num_workers=2",
        "data.prefetch_factor=1",
        f"paths.run_dir={tmp_path}",
    ]
    process = start(command, ranks)
    try:
        lines = tmp_path / "metrics.jsonl"
        wait_for(lambda: lines.exists() and lines.read_text().count("\n") >= 2, process)
        last = process.pid if ranks == 1 else ranks_of(process)[ranks - 1]
        victims = wait_for(lambda: workers_of(last), process)
        os.kill(victims[-1], signal.SIGKILL)
        output = process.communicate(timeout=60)[0]  # what the promise says: an end within a minute
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == EXIT_FAULT, output
    said = f"died (pid {victims[-1]}, killed by SIGKILL)"
    assert said in output and "resume=auto" in output
    if ranks == 1:  # else torchrun adds a traceback of its own, and rank 0 only knows that the other failed
        assert "Traceback" not in output and said in (tmp_path / "train.log").read_text()


# -- damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Eight episodes with a file each, one of them cut short after the statistics were taken."""
    camera = Camera(episodes_per_file=1)
    dataset = Dataset(lengths=(9,) * 8, cameras={"observation.images.front": camera}, episodes_per_data_file=1)
    root = write(tmp_path / "set", dataset)
    video = root / "videos/observation.images.front/chunk-000/file-005.mp4"
    video.write_bytes(video.read_bytes()[:400])
    return root


def of(root):
    return [f"data.sources.main.root={root}", "~data.sources.old", "data.sources.main.val_split_ratio=0"]


def quarantine(run_dir):
    rows = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    return sorted((r["episode"], r["frame"], r["pass"]) for r in rows)


def test_ranks_and_workers_write_one_quarantine_and_train_on_the_same_batches(damaged, tmp_path):
    steps = [*QUICK, *of(damaged), "trainer.steps=18", "data.bad_samples.max_fraction=0.9"]
    alone = train_here(steps, tmp_path / "alone")
    done = run([*steps, "data.num_workers=2", f"paths.run_dir={tmp_path / 'two'}"], 2)
    assert done.returncode == 0, done.stderr
    said = (alone / "train.log").read_text()
    replaced = int(metrics(alone)[18]["Training/SubstitutedWindows"])
    assert "1 windows so far can't be read and were replaced" in said and f"{replaced} windows were replaced" in said
    found = quarantine(alone)
    assert {episode for episode, _, _ in found} == {5} and len(found) >= 9
    assert quarantine(tmp_path / "two") == found
    mine, theirs = metrics(alone), metrics(tmp_path / "two")
    for step, row in mine.items():
        assert row["Training/BatchId"] == theirs[step]["Training/BatchId"]
        assert row["Training/SubstitutedWindows"] == theirs[step]["Training/SubstitutedWindows"]
        assert abs(row["Training/Loss"] - theirs[step]["Training/Loss"]) < 1e-4
    assert mine[18]["Training/SubstitutedWindows"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_bad_windows_stop_every_rank_with_one_message(ranks, damaged, tmp_path):
    limits = ["data.bad_samples.max_fraction=0.01", "data.bad_samples.grace=2"]
    done = run([*QUICK, *of(damaged), *limits, "trainer.steps=500", f"paths.run_dir={tmp_path / 'run'}"], ranks)
    assert done.returncode in (EXIT_USER, EXIT_FAULT) and (ranks > 1 or done.returncode == EXIT_USER)
    assert done.stderr.count("windows could not be read (data.bad_samples") == 1, done.stderr
    assert "quarantine.jsonl" in done.stderr


# -- changed data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path):
    """A run of 5 steps with a filter, its dataset and the filter's path."""
    root = write(tmp_path / "set", Dataset(lengths=(9, 12, 7, 15), cameras={}))
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps({str(e): [[0, 6]] for e in range(4)}))
    settings = [*of(root), "data.sources.main.use_filter_dict=true", f"data.sources.main.filter_dict_path={path}"]
    command = [
        *QUICK,
        *settings,
        "scheduler=constant",
        "checkpoint.every=5",
        "data.sources.main.state=[observation.state]",
    ]
    run_dir = train_here([*command, "trainer.steps=5"], tmp_path / "run")
    return command, run_dir, root, path


def change_filter(root, path):
    path.write_text(json.dumps({str(e): [[1, 7]] for e in range(4)}))


def change_files(root, path):
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps({**info, "exported_again": True}))


CHANGES = {
    "filter": (change_filter, [], "source 'main': the filter file changed"),
    "files": (change_files, [], "source 'main': the dataset's files changed"),
    "settings": (
        None,
        ["data.sources.main.exclude_episodes=[2]"],
        r"data\.sources\.main\.exclude_episodes: \[\] -> \[2\]",
    ),
    "seed": (None, ["seed=1"], "seed: 0 -> 1"),
    "batch": (None, ["trainer.global_batch_size=8"], "trainer.global_batch_size: 4 -> 8"),
    "lanes": (None, ["data.lanes_per_sample=2"], "data.lanes_per_sample"),
}


@pytest.mark.parametrize("change", by_day(CHANGES, "files", "settings", "batch"))
def test_a_changed_plan_is_refused_by_name_and_goes_on_with_restart(change, begun, tmp_path):
    command, run_dir, root, path = begun
    act, overrides, message = CHANGES[change]
    if act:
        act(root, path)
    more = [*command, *overrides, "trainer.steps=8"]
    with pytest.raises(Exception, match=message) as refused:
        train_here([*more, "resume=auto"], run_dir)
    assert "resume.data=restart" in str(refused.value)
    train_here([*more, "resume.data=restart", "resume=auto"], run_dir)  # in either order
    rows = metrics(run_dir)
    assert sorted(rows) == list(range(1, 9))
    saved = json.loads((run_dir / "checkpoints/last/run.json").read_text())["stream"]
    batch = saved["batch_size"]
    start = saved["t"] - 3 * batch
    assert start == saved["epoch_size"]  # 20 samples of an epoch of 24: the next one is the second
    train_here([*more, "trainer.steps=9", "resume=auto"], run_dir)  # and from there it is exact again
    assert sorted(metrics(run_dir)) == list(range(1, 10))


def test_a_share_that_holds_out_the_same_episodes_is_no_change_of_the_plan(tmp_path):
    share = "data.sources.main.val_split_ratio="  # at least one episode
    command = [*QUICK, "scheduler=constant", f"{share}0.01"]
    run_dir = train_here([*command, "trainer.steps=2"], tmp_path / "run")
    train_here([*command, "trainer.steps=3", f"{share}0.001", "resume=auto"], run_dir)
    assert sorted(metrics(run_dir)) == [1, 2, 3]


def test_weights_are_named_when_only_they_change(tmp_path):
    command = [*QUICK, "scheduler=constant", "checkpoint.every=2"]
    run_dir = train_here([*command, "trainer.steps=2"], tmp_path / "run")
    with pytest.raises(Exception, match=r"data\.sources\.old\.weight: None -> 3\.0 \(the data plan changes\)"):
        train_here([*command, "trainer.steps=4", "data.sources.old.weight=3.0", "resume=auto"], run_dir)


def test_restart_without_a_checkpoint_is_a_mistake(tmp_path):
    done = run([*QUICK, "trainer.steps=1", "resume.data=restart", f"paths.run_dir={tmp_path / 'run'}"])
    assert done.returncode == EXIT_USER and "resume.data=restart without a checkpoint" in done.stderr


@pytest.mark.parametrize("form", ["resume=auto", "resume.checkpoint=auto", "resume={}", "+resume=auto"])
def test_every_way_to_say_resume_means_the_same(form, tmp_path):
    command = [*QUICK, "checkpoint.every=2", "scheduler=constant"]
    run_dir = train_here([*command, "trainer.steps=2"], tmp_path / "run")
    train_here([*command, "trainer.steps=3", form.format(run_dir)], run_dir)
    assert sorted(metrics(run_dir)) == [1, 2, 3]


def test_a_moved_dataset_is_the_same_dataset(tmp_path):
    root = write(tmp_path / "set", Dataset(lengths=(9, 12), cameras={}))
    command = [*QUICK, "checkpoint.every=2", "scheduler=constant"]
    run_dir = train_here([*command, *of(root), "trainer.steps=2"], tmp_path / "run")
    shutil.move(root, tmp_path / "elsewhere")
    train_here([*command, *of(tmp_path / "elsewhere"), "trainer.steps=3", "resume=auto"], run_dir)
    assert sorted(metrics(run_dir)) == [1, 2, 3]
