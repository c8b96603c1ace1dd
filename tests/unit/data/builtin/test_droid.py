"""The built-in sample: real files in LeRobot's layout, the same on every run, whose goals only the images show."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from opentau_train.data.builtin import arm, scene
from opentau_train.data.builtin.droid import CONTROL_MODES, SampleSpec, ensure_droid_sample, plan, render
from opentau_train.errors import UserError
from tests import warm
from tests.nightly import at_night

SMALL = SampleSpec(num_episodes=5, min_frames=60, max_frames=66, episodes_per_data_file=3, episodes_per_video_file=2)
TINY = SampleSpec(num_episodes=1, min_frames=60, max_frames=60)
GENERATE = """
from pathlib import Path
from opentau_train.data.builtin.droid import SampleSpec, ensure_droid_sample
ensure_droid_sample(Path({!r}), {!r})
"""


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    return ensure_droid_sample(tmp_path_factory.mktemp("cache"), SMALL)


def info(root: Path) -> dict:
    return json.loads((root / "meta" / "info.json").read_text())


def episodes(root: Path) -> list[dict]:
    return pq.read_table(root / "meta" / "episodes").to_pylist()


def rows(root: Path, episode: dict):
    path = info(root)["data_path"].format(
        chunk_index=episode["data/chunk_index"], file_index=episode["data/file_index"]
    )
    table = pq.read_table(root / path)
    return table.filter(np.equal(table["episode_index"].to_numpy(), episode["episode_index"]))


def video(root: Path, camera: str, file_index: int) -> Path:
    key = f"observation.images.{camera}"
    return root / info(root)["video_path"].format(video_key=key, chunk_index=0, file_index=file_index)


def start_generating(cache: Path, spec: SampleSpec) -> subprocess.Popen:
    return warm.Popen([sys.executable, "-c", GENERATE.format(str(cache), spec)])


def contents(cache: Path) -> dict[str, bytes]:
    (complete,) = [path for path in cache.iterdir() if "partial" not in path.name]
    return {str(p.relative_to(complete)): p.read_bytes() for p in sorted(complete.rglob("*")) if p.is_file()}


def test_default_sample_has_enough_episodes_of_the_stated_length():
    lengths = [len(plan(SampleSpec(), mode, i)) for mode in CONTROL_MODES for i in range(SampleSpec().num_episodes)]
    assert len(lengths) >= 24
    assert 60 <= min(lengths) < max(lengths) <= 150


@at_night
def test_generating_again_gives_the_same_bytes(tmp_path):
    ensure_droid_sample(tmp_path / "one", TINY, num_processes=2)
    ensure_droid_sample(tmp_path / "two", TINY, num_processes=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_existing_sample_is_reused(roots):
    before = {path: path.stat().st_mtime_ns for path in roots["joint"].rglob("*")}
    assert ensure_droid_sample(roots["joint"].parents[1], SMALL) == roots
    assert {path: path.stat().st_mtime_ns for path in roots["joint"].rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", CONTROL_MODES)
def test_info_and_columns_follow_the_droid_schema(roots, mode):
    about = info(roots[mode])
    assert (about["codebase_version"], about["fps"], about["control_mode"]) == ("v3.0", 15, mode)
    assert about["robot_type"] == "franka"
    table = rows(roots[mode], episodes(roots[mode])[0])
    pose = ["x", "y", "z", "roll", "pitch", "yaw"]
    joints = [f"joint_{i}" for i in range(7)]
    for side in ("observation.state", "action"):
        expected = {"joint_position": joints, "cartesian_position": pose, "gripper_position": ["gripper"]}
        for name, axes in expected.items():
            feature = about["features"][f"{side}.{name}"]
            assert (feature["dtype"], feature["shape"], feature["names"]) == ("float32", [len(axes)], {"axes": axes})
        flat = np.stack(table[side].to_numpy(zero_copy_only=False))
        named = np.stack(table[f"{side}.{'joint' if mode == 'joint' else 'cartesian'}_position"].to_numpy(False))
        assert about["features"][side]["shape"] == [flat.shape[1]]
        np.testing.assert_array_equal(flat[:, :-1], named)
        np.testing.assert_array_equal(flat[:, -1], table[f"{side}.gripper_position"].to_numpy())
    for camera in ("wrist_left", "exterior_1_left", "exterior_2_left"):
        feature = about["features"][f"observation.images.{camera}"]
        assert (feature["dtype"], feature["shape"]) == ("video", [180, 320, 3])
    columns = {name for name, feature in about["features"].items() if feature["dtype"] != "video"}
    assert set(table.column_names) == columns


@pytest.mark.slow
@pytest.mark.parametrize("mode", CONTROL_MODES)
def test_tables_agree_with_one_another(roots, mode):
    root = roots[mode]
    tasks = dict(
        zip(*pq.read_table(root / "meta" / "tasks.parquet").select(["task_index", "task"]).to_pydict().values())
    )
    first = 0
    for number, episode in enumerate(episodes(root)):
        table = rows(root, episode)
        assert episode["episode_index"] == number
        assert (episode["dataset_from_index"], episode["dataset_to_index"]) == (first, first + episode["length"])
        assert table["index"].to_pylist() == list(range(first, first + episode["length"]))
        assert table["frame_index"].to_pylist() == list(range(episode["length"]))
        np.testing.assert_allclose(table["timestamp"], np.arange(episode["length"]) / 15, atol=1e-6)
        assert {tasks[i] for i in table["task_index"].to_pylist()} == set(episode["tasks"])
        assert set(table["language_instruction"].to_pylist()) == set(episode["tasks"])
        first += episode["length"]
    assert (info(root)["total_frames"], info(root)["total_episodes"]) == (first, SMALL.num_episodes)


@pytest.mark.slow
@pytest.mark.parametrize("mode", CONTROL_MODES)
def test_each_episode_is_one_row_group_and_files_are_several(roots, mode):
    files = sorted((roots[mode] / "data").rglob("*.parquet"))
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [3, 2]


@pytest.mark.slow
@pytest.mark.parametrize("mode", CONTROL_MODES)
def test_statistics_are_those_of_the_rows(roots, mode):
    statistics = json.loads((roots[mode] / "meta" / "stats.json").read_text())["action"]
    tables = [rows(roots[mode], episode) for episode in episodes(roots[mode])]
    actions = np.concatenate([np.stack(table["action"].to_numpy()) for table in tables]).astype(np.float64)
    np.testing.assert_allclose(statistics["mean"], actions.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(statistics["std"], actions.std(axis=0), atol=1e-6)
    np.testing.assert_allclose(statistics["q99"], np.quantile(actions, 0.99, axis=0), atol=1e-6)
    assert statistics["count"] == [len(actions)]
    # Normalisation divides by these: none may be the noise's.
    assert min(statistics["std"]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("camera", scene.CAMERAS)
def test_every_row_has_its_frame_in_the_video(roots, camera):
    key = f"videos/observation.images.{camera}"
    for root in roots.values():
        told: dict[int, list[float]] = {}
        for episode in episodes(root):
            times = episode[f"{key}/from_timestamp"] + np.array(rows(root, episode)["timestamp"], np.float64)
            told.setdefault(episode[f"{key}/file_index"], []).extend(times)
        assert len(told) == 3
        for file_index, times in told.items():
            with av.open(str(video(root, camera, file_index))) as container:
                found = [frame.time for frame in container.decode(video=0)]
            assert found[0] == 0.0
            np.testing.assert_allclose(times, found, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("camera", scene.CAMERAS)
def test_frames_at_an_episodes_place_show_its_rows(roots, camera):
    number, key = 3, f"videos/observation.images.{camera}"  # the second episode of its mp4
    episode = episodes(roots["ee"])[number]
    with av.open(str(video(roots["ee"], camera, episode[f"{key}/file_index"]))) as container:
        decoded = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    first = round(episode[f"{key}/from_timestamp"] * 15)
    drawn = list(render(plan(SMALL, "ee", number), camera))
    assert first > 0 and len(drawn) == episode["length"] == len(decoded) - first
    for offset in (0, 10, len(drawn) - 1):
        errors = [np.abs(frame - drawn[offset]).mean() for frame in decoded]
        assert np.argmin(errors) == first + offset


@pytest.mark.slow
@pytest.mark.parametrize("camera", scene.EXTERIOR)
def test_ball_is_seen_in_nearly_all_exterior_frames(roots, camera):
    seen = []
    for mode, root in roots.items():
        for file_index in range(3):
            colours = [plan(SMALL, mode, i) for i in range(2 * file_index, min(2 * file_index + 2, SMALL.num_episodes))]
            colours = [scene.COLOURS[trajectory.colour] for trajectory in colours for _ in range(len(trajectory))]
            with av.open(str(video(root, camera, file_index))) as container:
                frames = list(zip(colours, container.decode(video=0), strict=True))
                for colour, frame in frames[::4]:
                    far = np.abs(frame.to_ndarray(format="rgb24").astype(int) - colour).max(axis=2)
                    seen.append((far < 45).sum() >= 100)
    assert np.mean(seen) >= 0.95


def test_ball_has_at_least_twelve_pixels_radius_everywhere():
    corners = np.array([(x, y, scene.BALL_RADIUS) for x in (0.33, 0.67) for y in (-0.38, 0.38)])
    for camera in scene.EXTERIOR.values():
        column, row, depth = camera.project(corners).T
        radius = camera.focal * scene.BALL_RADIUS / depth
        assert radius.min() >= 12
        assert np.all((column > radius) & (column < 320 - radius) & (row > radius) & (row < 180 - radius))


def test_inverse_kinematics_finds_the_pose():
    x, y = np.random.default_rng(0).uniform((0.33, -0.38), (0.67, 0.38), (200, 2)).T
    poses = np.column_stack([x, y, np.full(200, 0.13), np.pi + 0.5 * y, 0.8 * (0.5 - x), 0.4 * np.arctan2(y, x)])
    reached = arm.cartesian(arm.reach(poses))
    assert np.linalg.norm(reached[:, :3] - poses[:, :3], axis=1).max() < 0.01
    assert np.abs(reached[:, 3:] - poses[:, 3:]).max() < 0.01


def test_forward_kinematics_keeps_the_links_lengths():
    joints = np.random.default_rng(0).uniform(-2, 2, (50, 7))
    chain = arm.frames(joints)
    np.testing.assert_allclose(np.linalg.norm(chain[:, 2, :3, 3] - chain[:, 1, :3, 3], axis=1), 0.316)
    np.testing.assert_allclose(
        chain[:, :, :3, :3] @ chain[:, :, :3, :3].swapaxes(2, 3), np.tile(np.eye(3), (50, 8, 1, 1)), atol=1e-12
    )
    np.testing.assert_allclose(arm.rotation(arm.cartesian(joints)[:, 3:]), chain[:, -1, :3, :3], atol=1e-9)


@pytest.mark.parametrize("mode", CONTROL_MODES)
def test_arm_arrives_at_the_ball_before_it_hops(mode):
    for number in range(8):
        trajectory = plan(SampleSpec(), mode, number)
        hops = np.flatnonzero((np.diff(trajectory.ball, axis=0) != 0).any(axis=1))
        assert len(hops) >= 2
        tool = arm.cartesian(trajectory.command[hops + 1, :7])
        assert np.linalg.norm(tool[:, :2] - trajectory.ball[hops, :2], axis=1).max() < 0.03
        assert np.linalg.norm(np.diff(trajectory.ball[hops, :2], axis=0), axis=1).min() >= 0.15


@at_night
def test_state_does_not_tell_where_the_ball_goes():
    """As each next place is drawn afresh, the places after and before a hop are all but uncorrelated."""
    before, after = [], []
    for mode in CONTROL_MODES:
        for number in range(SampleSpec().num_episodes):
            ball = plan(SampleSpec(), mode, number).ball
            hops = np.flatnonzero((np.diff(ball, axis=0) != 0).any(axis=1))
            before.append(ball[hops, :2])
            after.append(ball[hops + 1, :2])
    before, after = np.concatenate(before), np.concatenate(after)
    assert len(before) > 100
    for axis in range(2):
        # The least distance of a hop makes the correlation slightly negative.
        assert abs(np.corrcoef(before[:, axis], after[:, axis])[0, 1]) < 0.35


@pytest.mark.parametrize("mode", CONTROL_MODES)
def test_action_is_the_next_frames_command(mode):
    trajectory = plan(SampleSpec(), mode, 0)
    lag = trajectory.measured[1:, :7] - trajectory.command[1:-1, :7]
    assert np.abs(lag).max() < 0.1
    assert (trajectory.measured[:, 7] >= 0).all() and (trajectory.measured[:, 7] <= 1).all()


@pytest.mark.slow
def test_racing_processes_leave_one_good_sample(tmp_path):
    racers = [start_generating(tmp_path, TINY) for _ in range(2)]
    assert [racer.wait(timeout=120) for racer in racers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1
    roots = ensure_droid_sample(tmp_path, TINY)
    assert all(len(rows(root, episodes(root)[0])) == 60 for root in roots.values())


@at_night
def test_killed_generation_does_not_count_and_leaves_no_process(tmp_path):
    spec = SampleSpec(num_episodes=6, min_frames=60, max_frames=60, episodes_per_video_file=1)
    process = start_generating(tmp_path, spec)
    while not list(tmp_path.glob("*.partial-*/*/videos")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    (partial,) = tmp_path.iterdir()
    # The renderers must end long before their work is done: wait until the leftover no longer grows.
    sizes = [-1, 0]
    while sizes[-1] != sizes[-2]:
        time.sleep(0.5)
        sizes.append(sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()))
    assert len(list(partial.rglob("*.mp4"))) < 2 * 3 * spec.num_episodes
    ensure_droid_sample(tmp_path, spec)
    complete = tmp_path / f"droid_sample-{spec.stamp}"
    assert set(tmp_path.iterdir()) == {partial, complete}
    assert len(list(complete.rglob("*.mp4"))) == 2 * 3 * spec.num_episodes


def test_another_specification_gets_another_directory():
    assert SMALL.stamp != TINY.stamp
    assert SMALL.stamp == SampleSpec(**vars(SMALL)).stamp


def test_unwritable_cache_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match=r"paths\.cache_dir"):
        ensure_droid_sample(tmp_path / "file", TINY)
