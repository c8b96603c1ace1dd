"""`tools.reencode` keeps every frame's time, and gives nothing where a frame is another one."""

import av
import numpy as np
import pytest

from opentau_train.config.data import SourceSettings
from opentau_train.data.lerobot import LeRobotSource
from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.tools import reencode
from opentau_train.types import WindowSpec
from tests.lerobot_writer import H264_B, Camera, Dataset, write

CAMERA = "observation.images.front"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Reordered frames, several episodes in a file, rows at uneven times, a first frame that isn't shown at 0."""
    seconds = [np.cumsum([0.0, *np.tile([0.02, 0.05, 0.03], 5)][:n]) for n in (11, 7, 13)]
    camera = Camera(gop=250, options=H264_B, episodes_per_file=2, shift_s=0.5)
    return write(tmp_path_factory.mktemp("old") / "d", Dataset((11, 7, 13), cameras={CAMERA: camera}, seconds=seconds))


def frames(path):
    """(seconds, keyframe) of every frame, in the order shown."""
    with av.open(str(path)) as container:
        return [(frame.pts * frame.time_base, frame.key_frame) for frame in container.decode(video=0)]


def opened(root):
    return LeRobotSource().open("d", SourceSettings(root=str(root)))


@pytest.mark.parametrize("size", [(), ("--size", "32", "48")])
def test_frames_keep_their_times_and_episodes_begin_with_keyframes(old, tmp_path, capsys, size):
    assert reencode.main([str(old), "--out", str(tmp_path / "new"), "--gop", "3", "--psnr", "20", *size]) == EXIT_OK
    assert "31 frames at their own times" in capsys.readouterr().out
    files = sorted(path.relative_to(old) for path in old.rglob("*.mp4"))
    assert files == sorted(path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*.mp4"))
    for file in files:
        before, after = frames(old / file), frames(tmp_path / "new" / file)
        assert [seconds for seconds, _ in before] == [seconds for seconds, _ in after]
        keys = np.flatnonzero([key for _, key in after])
        assert np.diff(keys, append=len(after)).max() <= 3
    found = opened(tmp_path / "new").keyframes(tmp_path / "cache")
    assert [part[0] for part in np.split(found.frame, found.ends[:-1])] == [0, 0, 0]


def test_the_new_dataset_gives_the_same_windows(old, tmp_path):
    assert reencode.main([str(old), "--out", str(tmp_path / "new"), "--crf", "1"]) == EXIT_OK
    window = WindowSpec(chunk_length=4, image_size=(64, 96))
    cursors = [opened(root).cursors(window).cursor() for root in (old, tmp_path / "new")]
    for episode, length in enumerate((11, 7, 13)):
        for frame in range(length):
            before, after = (cursor.read(episode, frame) for cursor in cursors)
            np.testing.assert_array_equal(before.actions, after.actions)
            apart = before.images["front"].astype(int) - after.images["front"]
            assert np.sqrt(np.square(apart).mean()) < 4


def test_the_new_size_is_told_in_the_metadata(old, tmp_path):
    out = ["--out", str(tmp_path / "new"), "--size", "32", "48", "--psnr", "20"]
    assert reencode.main([str(old), *out]) == EXIT_OK
    assert opened(tmp_path / "new").frame_sizes == {"front": (32, 48)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--crf", "51", "--psnr", "45"], "lower --crf"),
        (["--codec", "none"], "no encoder 'none'"),
        (["--size", "33", "48"], "even"),
        (["--gop", "0"], "--gop"),
    ],
)
def test_what_can_not_be_done_leaves_nothing(old, tmp_path, capsys, arguments, says):
    assert reencode.main([str(old), "--out", str(tmp_path / "new"), *arguments]) == EXIT_USER
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_directory_that_exists_is_not_written_to(old, tmp_path, capsys):
    assert reencode.main([str(old), "--out", str(tmp_path)]) == EXIT_USER
    assert "exists" in capsys.readouterr().err
