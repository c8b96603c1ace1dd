"""Where a dataset's videos can be entered: what their indices say, against their packets and the readers' counts."""

import shutil

import av
import numpy as np
import pytest

from opentau_train import cli
from opentau_train.config.data import SourceSettings
from opentau_train.config.settings import load_settings
from opentau_train.data.lerobot import LeRobotSource, keyframes
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.open import open_mixture
from opentau_train.tools.decoding import decoded_a_frame
from opentau_train.types import Address
from tests.lerobot_writer import AV1, H264_B, HEVC_B, Camera, Dataset, write

LENGTHS = (11, 7, 13, 9, 5)


def opened(root):
    return LeRobotSource().open("d", SourceSettings(root=str(root)))


def of_episodes(found):
    """[E] the keyframes of each episode, as lists."""
    return [part.tolist() for part in np.split(found.frame, found.ends[:-1])]


def all_by_packets(source, camera, position):
    """The frames at which the file of an episode has keyframes, counted from the episode's first, by the packets' own
    flags and times."""
    span = source.reading.stored.videos[camera].span(position)
    with av.open(str(span.path)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.is_keyframe and p.pts is not None]
    times = sorted(float(p.pts * p.time_base) for p in packets)
    return [round((t - span.start) * source.fps) for t in times]


def by_packets(source, camera, position):
    """The same of the episode's own, after the one that it is entered by."""
    frames = all_by_packets(source, camera, position)
    length = int(source.episodes.length[position])
    entry = max((f for f in frames if f <= 0), default=frames[0])
    return [entry, *(f for f in frames if 0 < f < length)]


@pytest.mark.parametrize(("codec", "options"), [("libx264", H264_B), ("libsvtav1", AV1)], ids=["h264", "av1"])
def test_the_index_tells_what_the_packets_tell_also_in_shared_files_with_reordered_frames(tmp_path, codec, options):
    camera = Camera(codec=codec, gop=4, options=options, episodes_per_file=3)
    source = opened(write(tmp_path / "d", Dataset(LENGTHS, cameras={"observation.images.front": camera})))
    found = source.keyframes(tmp_path / "cache")
    assert of_episodes(found) == [by_packets(source, "front", position) for position in range(len(LENGTHS))]


def test_open_groups_are_told_early_by_no_more_frames_than_are_reordered(tmp_path):
    """Their first frames in storage order are shown before the keyframe, and the index knows that order only."""
    camera = Camera(codec="libx265", gop=4, options=HEVC_B, episodes_per_file=1)
    source = opened(write(tmp_path / "d", Dataset(LENGTHS, cameras={"observation.images.front": camera})))
    for position, told in enumerate(of_episodes(source.keyframes(tmp_path / "cache"))):
        found = np.array(all_by_packets(source, "front", position))
        assert all(((found - frame >= 0) & (found - frame <= 3)).any() for frame in told)


def test_the_camera_with_the_fewest_keyframes_counts(tmp_path):
    cameras = {"observation.images.a": Camera(gop=2), "observation.images.b": Camera(gop=7)}
    source = opened(write(tmp_path / "d", Dataset(LENGTHS, cameras=cameras)))
    assert of_episodes(source.keyframes(tmp_path))[2] == by_packets(source, "b", 2)


def test_what_was_read_once_is_kept_until_the_dataset_is_another(tmp_path):
    cameras = {"observation.images.front": Camera(gop=4, episodes_per_file=1)}
    source = opened(write(tmp_path / "d", Dataset(LENGTHS, cameras=cameras)))
    found = source.keyframes(tmp_path / "cache")
    shutil.rmtree(tmp_path / "d" / "videos")
    again = source.keyframes(tmp_path / "cache")
    np.testing.assert_array_equal(again.frame, found.frame)
    np.testing.assert_array_equal(again.ends, found.ends)
    (kept,) = (tmp_path / "cache" / "keyframes").iterdir()
    kept.write_bytes(b"PK broken")
    assert of_episodes(source.keyframes(tmp_path / "cache")) == [[0]] * len(LENGTHS)  # the videos are gone


@pytest.mark.parametrize(("gop", "alike"), [(3, True), (None, False)])
def test_of_many_files_some_stand_for_all_where_their_keyframes_come_equally_often(tmp_path, monkeypatch, gop, alike):
    cameras = {"observation.images.front": Camera(gop=gop or 4, episodes_per_file=1)}
    source = opened(write(tmp_path / "d", Dataset((11, 7, 13, 9, 11), cameras=cameras)))
    if not alike:  # the last file has keyframes at other distances
        other = {"observation.images.front": Camera(gop=5, episodes_per_file=1)}
        write(tmp_path / "e", Dataset((11, 7, 13, 9, 11), cameras=other))
        name = "videos/observation.images.front/chunk-000/file-004.mp4"
        shutil.copy(tmp_path / "e" / name, tmp_path / "d" / name)
    monkeypatch.setattr(keyframes, "MANY", 2)
    read, of_file = [], keyframes._of_file
    monkeypatch.setattr(keyframes, "_of_file", lambda places, number: read.append(number) or of_file(places, number))
    found = of_episodes(source.keyframes(tmp_path))
    assert found == [by_packets(source, "front", position) for position in range(5)]
    assert len(set(read)) == (2 if alike else 5)


def test_a_dataset_without_videos_has_none(tmp_path):
    camera = Camera(codec=None)
    source = opened(write(tmp_path / "d", Dataset(cameras={"observation.images.front": camera})))
    assert source.keyframes(tmp_path) is None


@pytest.mark.parametrize(("gop", "batch", "history"), [(5, 4, 0), (30, 16, 0), (30, 4, 2)])
def test_the_plan_foretells_what_the_readers_decode(tmp_path, gop, batch, history):
    cameras = {"observation.images.front": Camera(gop=gop, episodes_per_file=1, size=(16, 16), options={"bf": "0"})}
    root = write(tmp_path / "d", Dataset((60, 45, 52, 61), cameras=cameras, fps=10))
    given = [f"data.sources.main.root={root}", "data.sources.main.val_split_ratio=0", f"data.history={history}"]
    sizes = ["data.image_size=[16,16]", f"paths.cache_dir={tmp_path / 'cache'}"]
    mixture = open_mixture(load_settings(cli.compose(["+recipe=lerobot", *given, *sizes])))
    tape = mixture.tape(batch)
    windows, builder = tape.windows(np.arange(tape.epoch_size)), SampleBuilder(mixture, training=True)
    columns = (windows.slot, windows.ahead, windows.dataset, windows.episode, windows.frame, windows.pass_index)
    for slot, ahead, *address in zip(*(column.tolist() for column in columns), strict=True):
        builder.build(slot, Address(*address), ahead=ahead)
    decoded = builder.factories[0].frames_decoded
    builder.close()
    expected = decoded_a_frame(mixture, tape)["main"]
    assert decoded / tape.epoch_size == pytest.approx(expected, rel=1e-9 if not history else 0.05)
