"""`video.py` and `video_file.py` against a decoding of each whole file: the same pixels in any order of reading."""

from __future__ import annotations

import itertools
import os
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opentau_train.data.decode import video_file
from opentau_train.data.decode.decoding import Decoding
from opentau_train.data.decode.fit import fit
from opentau_train.data.decode.images import DepthError, ImageError, Resizer, decode_image
from opentau_train.data.decode.video import VideoPool
from opentau_train.data.decode.video_file import VideoError
from opentau_train.errors import UserError
from tests.lerobot_writer import AV1, H264_B, HEVC_B, TICKS, Camera, decode_all, picture, png, write_video
from tests.limits import room_for

FRAMES = 70
EVEN = np.arange(FRAMES) / 30
UNEVEN = np.cumsum(np.random.default_rng(1).integers(600, 9000, FRAMES)) / TICKS

FILES = {
    "h264_gop2": (Camera(gop=2), EVEN),
    "h264_b_frames": (Camera(gop=30, options=H264_B), EVEN),
    "h264_one_gop": (Camera(gop=250, options=H264_B), EVEN),
    "h264_open_gop": (Camera(gop=12, options={**H264_B, "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}), EVEN),
    "h264_uneven_times": (Camera(gop=12, options=H264_B), UNEVEN),
    "h264_starts_late": (Camera(gop=12, options=H264_B), EVEN + 0.7),
    "h264_grey": (Camera(gop=12, pix_fmt="gray"), EVEN),
    "h264_full_range": (Camera(gop=12, pix_fmt="yuvj420p"), EVEN),
    "hevc_open_gop": (Camera("libx265", gop=12, options=HEVC_B), EVEN),
    "av1_gop2": (Camera("libsvtav1", gop=2, options=AV1), EVEN),
    "mpeg4_colour_in_container": (Camera("mpeg4", gop=12, ticks=30, colour=(2, 1)), EVEN),
    "mpeg4": (Camera("mpeg4", gop=12, ticks=30), EVEN),
    "vp9": (Camera("libvpx-vp9", gop=12, options={"deadline": "realtime", "cpu-used": "8"}), EVEN),
}
REMUXED = {
    "h264_no_edit_list": {"use_editlist": "0"},  # the first frame is then shown late
    "h264_cut_by_edit_list": {},  # hides the start
    "h264_other_clock": {"video_track_timescale": "30000"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def video(folder):
    """name -> (path, seconds [N], RGB frames), written when first asked for."""

    @cache
    def make(name: str) -> tuple[Path, np.ndarray, list[np.ndarray]]:
        path = folder / f"{name}.mp4"
        if name in REMUXED:
            _remux(make("h264_b_frames")[0], path, REMUXED[name], cut=name == "h264_cut_by_edit_list")
        else:
            camera, seconds = FILES[name]
            write_video(path, camera, [(s, picture(0, i, name, camera.size)) for i, s in enumerate(seconds)])
        times, frames = decode_all(path)
        return path, times, [f.to_ndarray(format="rgb24") for f in frames]

    return make


def _remux(source: Path, target: Path, options: dict[str, str], *, cut: bool) -> None:
    """Copy packets with the muxer's `options`; `cut`: those before 0.3 s are before the start."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        offset = round(0.3 / old.streams.video[0].time_base) if cut else 0
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.pts -= offset
                packet.dts -= offset
                packet.stream = stream
                new.mux(packet)


def rgb(frame: av.VideoFrame) -> np.ndarray:
    return Resizer(None)(frame)


@pytest.mark.parametrize("name", [*FILES, *REMUXED])
def test_reading_in_order_gives_every_frame_and_decodes_each_once(video, name):
    path, times, frames = video(name)
    assert len(times) >= FRAMES - 10
    pool = VideoPool()
    cursor = pool.cursor()
    for time, expected in zip(times, frames):
        np.testing.assert_array_equal(rgb(cursor.read(path, time, 1e-4)), expected)
    assert pool.frames_decoded <= 1.02 * len(times) + (12 if name == "h264_cut_by_edit_list" else 0)
    pool.close()


@pytest.mark.parametrize("name", [*FILES, *REMUXED])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_of_reading_gives_the_same_frames(video, name, data):
    path, times, frames = video(name)
    order = data.draw(st.lists(st.integers(0, len(times) - 1), min_size=1, max_size=12))
    pool = VideoPool()
    cursor = pool.cursor()
    for i in order:
        np.testing.assert_array_equal(rgb(cursor.read(path, times[i] + 2e-5, 1e-4)), frames[i])
    pool.close()


@pytest.mark.parametrize("most_bytes", [1, 3000, video_file.BYTES_PER_READ])
@pytest.mark.parametrize("name", ["h264_b_frames", "h264_cut_by_edit_list", "hevc_open_gop", "av1_gop2"])
def test_cursors_that_alternate_on_one_file_do_not_disturb_each_other(video, name, most_bytes, monkeypatch):
    """However many packets are taken at once: each alone, a few, or as many as there are."""
    monkeypatch.setattr(video_file, "BYTES_PER_READ", most_bytes)
    path, times, frames = video(name)
    pool = VideoPool()
    starts = [0, 3, 17, 18, 40, 59]
    cursors = [pool.cursor() for _ in starts]
    for step in range(len(times) - max(starts)):
        for start, cursor in zip(starts, cursors):
            expected = frames[start + step]
            np.testing.assert_array_equal(rgb(cursor.read(path, times[start + step], 1e-4)), expected)
    assert len(pool) == 1
    pool.close()


def test_alternating_cursors_decode_no_more_than_one_alone(video):
    path, times, _ = video("h264_one_gop")
    alone, shared = VideoPool(), VideoPool()
    cursor, pair = alone.cursor(), [shared.cursor(), shared.cursor()]
    for time in times:
        cursor.read(path, time, 1e-4)
        for one in pair:
            one.read(path, time, 1e-4)
    assert shared.frames_decoded == 2 * alone.frames_decoded
    alone.close()
    shared.close()


@pytest.mark.parametrize(("name", "most"), [("av1_gop2", 2), ("h264_uneven_times", 16)])
def test_a_jump_forward_decodes_only_from_the_last_keyframe(video, name, most):
    path, times, frames = video(name)
    pool = VideoPool()
    cursor = pool.cursor()
    cursor.read(path, times[0], 1e-4)
    before = pool.frames_decoded
    np.testing.assert_array_equal(rgb(cursor.read(path, times[61], 1e-4)), frames[61])
    assert pool.frames_decoded - before <= most
    pool.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_nearest_frame_is_given_or_named_when_out_of_tolerance(video, data):
    path, times, frames = video("h264_uneven_times")
    pool = VideoPool()
    cursor = pool.cursor()
    for wanted in data.draw(st.lists(st.floats(-0.1, times[-1] + 0.1), min_size=1, max_size=4)):
        gaps = np.abs(times - wanted)
        if np.sum(gaps < gaps.min() + 1e-9) > 1:
            continue
        nearest = int(np.argmin(gaps))
        np.testing.assert_array_equal(rgb(cursor.read(path, wanted, 1.0)), frames[nearest])
        if gaps.min() > 1e-3:
            with pytest.raises(VideoError, match=f"{path.name} has no frame within 0.0005 s.*{times[nearest]:.6f}"):
                cursor.read(path, wanted, 0.0005)
    pool.close()


def test_a_cursor_that_changes_files_gives_each_file_s_frames(video):
    """Files of one coding share a decoder, which may hold delayed pictures of the last file; others get their own."""
    names = ["h264_b_frames", "h264_one_gop", "h264_cut_by_edit_list", "h264_other_clock", "h264_full_range"]
    names += ["hevc_open_gop", "av1_gop2"]
    pool = VideoPool()
    cursor = pool.cursor()
    places = [3, 40, 41, 0, 59]
    for first, second in itertools.permutations(names, 2):
        for name in (first, second):
            path, times, frames = video(name)
            for i in places:
                np.testing.assert_array_equal(rgb(cursor.read(path, times[i], 1e-4)), frames[i])
    pool.close()


def test_a_decoder_goes_on_in_the_next_file_of_its_coding_and_not_after_damage(video, folder):
    (one, times, _), (other, _, frames) = video("h264_b_frames"), video("h264_one_gop")
    (folder / "half.mp4").write_bytes(one.read_bytes()[:-2000])
    pool = VideoPool()
    cursor = pool.cursor()
    cursor.read(one, times[0], 1e-4)
    decoder = cursor._decoder
    np.testing.assert_array_equal(rgb(cursor.read(other, times[9], 1e-4)), frames[9])
    assert cursor._decoder is decoder
    with pytest.raises(VideoError):
        cursor.read(folder / "half.mp4", times[0], 1e-4)
    np.testing.assert_array_equal(rgb(cursor.read(other, times[9], 1e-4)), frames[9])
    assert cursor._decoder is not decoder
    pool.close()


def test_a_run_of_times_gives_the_frames_of_each(video):
    path, times, frames = video("h264_b_frames")
    pool = VideoPool()
    found = [rgb(f) for f in pool.cursor().read_all(path, times[7:31].tolist(), 1e-4)]
    np.testing.assert_array_equal(found, frames[7:31])
    with pytest.raises(VideoError, match="no frame within"):
        list(pool.cursor().read_all(path, [times[2], times[-1] + 1.0], 1e-4))
    pool.close()


def test_a_broken_file_is_named_and_leaves_the_pool_usable(video, folder):
    path, times, frames = video("h264_b_frames")
    whole = path.read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").write_bytes(b"")
    pool = VideoPool()
    cursor = pool.cursor()
    for name in ("cut.mp4", "text.mp4", "empty.mp4", "missing.mp4"):
        with pytest.raises(VideoError, match=name):
            cursor.read(folder / name, 0.0, 1e-4)
        np.testing.assert_array_equal(rgb(cursor.read(path, times[5], 1e-4)), frames[5])
    pool.close()


@pytest.mark.parametrize("name", ["vp9", "h264_b_frames", "hevc_open_gop", "mpeg4"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_a_truncated_file_gives_true_frames_or_none(video, folder, name, share):
    path, times, frames = video(name)
    with av.open(str(path)) as old, av.open(str(folder / "fast.mp4"), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    whole = (folder / "fast.mp4").read_bytes()
    (folder / "cut_short.mp4").write_bytes(whole[: int(len(whole) * share)])
    pool = VideoPool()
    cursor = pool.cursor()
    good = 0
    for time, expected in zip(times, frames):
        try:
            found = rgb(cursor.read(folder / "cut_short.mp4", time, 1e-4))
        except VideoError:
            continue
        np.testing.assert_array_equal(found, expected)
        good += 1
    assert 0 < good < len(times)
    pool.close()


def test_frames_built_on_a_damaged_one_fail_until_the_file_is_repaired(video, folder):
    path, times, frames = video("h264_b_frames")
    with av.open(str(path)) as container:
        place, size = [(p.pos, p.size) for p in container.demux(video=0) if p.is_keyframe][1]
    damaged = bytearray(path.read_bytes())
    # Only the end: the decoder conceals the loss and doesn't mark the frames that refer to it.
    damaged[place + size * 3 // 4 : place + size] = bytes(place + size - (place + size * 3 // 4))
    (folder / "damaged.mp4").write_bytes(damaged)
    assert any(
        not np.array_equal(f.to_ndarray(format="rgb24"), g)
        for f, g in zip(decode_all(folder / "damaged.mp4")[1][32:], frames[32:])
    )
    pool = VideoPool()
    cursor = pool.cursor()
    second = int(np.argmin(np.abs(times - 1.0)))
    for i in (second, second + 1, second + 9):
        with pytest.raises(VideoError, match=r"damaged\.mp4"):
            cursor.read(folder / "damaged.mp4", times[i], 1e-4)
    for i in (5, 12, second + 31):
        np.testing.assert_array_equal(rgb(cursor.read(folder / "damaged.mp4", times[i], 1e-4)), frames[i])
    with pytest.raises(VideoError):
        cursor.read(folder / "damaged.mp4", times[second], 1e-4)
    (folder / "repaired.mp4").write_bytes(path.read_bytes())
    (folder / "repaired.mp4").replace(folder / "damaged.mp4")
    np.testing.assert_array_equal(rgb(cursor.read(folder / "damaged.mp4", times[second], 1e-4)), frames[second])
    pool.close()


@pytest.mark.parametrize("far", [1e6, 1e15, 1e300, -1e15, -1e300])
@pytest.mark.parametrize("name", ["h264_b_frames", "av1_gop2"])
def test_times_that_no_clock_has_are_told_from_frames(video, name, far):
    """Metadata may name any number: first, after some frames, and asked for the distance to the nearest frame."""
    path, times, frames = video(name)
    pool = VideoPool()
    cursor = pool.cursor()
    for read_before in (range(0), range(3), range(20, 22)):
        for i in read_before:
            np.testing.assert_array_equal(rgb(cursor.read(path, times[i], 1e-4)), frames[i])
        with pytest.raises(VideoError, match="no frame"):
            cursor.read(path, far, 1.0)
    assert max(cursor.drift(path, np.array([times[3], far]))) >= 0.9e6
    np.testing.assert_array_equal(rgb(cursor.read(path, times[5], 1e-4)), frames[5])
    pool.close()


def test_rounded_frame_times_cost_no_second_decode(tmp_path):
    camera = Camera(gop=250, options=H264_B, ticks=1000)
    write_video(tmp_path / "ms.mp4", camera, [(s, picture(0, i, "ms", camera.size)) for i, s in enumerate(EVEN)])
    pool = VideoPool()
    cursor = pool.cursor()
    for time, expected in zip(EVEN, decode_all(tmp_path / "ms.mp4")[1]):
        np.testing.assert_array_equal(rgb(cursor.read(tmp_path / "ms.mp4", time, 1e-3)), rgb(expected))
    assert pool.frames_decoded <= FRAMES
    pool.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_no_more_files_are_open_than_cursors_and_none_after_close(video):
    some = [video(name) for name in ("h264_gop2", "h264_b_frames", "av1_gop2", "h264_uneven_times")]
    before = len(os.listdir("/proc/self/fd"))
    pool = VideoPool()
    cursors = [pool.cursor(), pool.cursor()]
    for i in range(4):
        for k, (path, times, frames) in enumerate(some):
            np.testing.assert_array_equal(rgb(cursors[k % 2].read(path, times[i], 1e-4)), frames[i])
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    cursors[0].close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["h264_gop2", "h264_b_frames", "h264_open_gop", "av1_gop2", "h264_cut_by_edit_list"])
def test_files_that_are_closed_for_others_go_on_where_they_were(video, folder, name, monkeypatch):
    """Ten cursors take turns in ten files of which two may be open: the same frames, none decoded twice, and a file
    opened again only for its next packets."""
    path, times, frames = video(name)
    paths = [folder / f"{name}_{i}.mp4" for i in range(10)]
    for copy in paths:
        copy.write_bytes(path.read_bytes())
    opened = []
    monkeypatch.setattr(video_file.av, "open", lambda *a, _open=av.open, **k: opened.append(a[0]) or _open(*a, **k))
    pool = VideoPool()
    cursors = [pool.cursor() for _ in paths]
    with room_for(2):
        for i, time in enumerate(times):
            for cursor, copy in zip(cursors, paths):
                np.testing.assert_array_equal(rgb(cursor.read(copy, time, 1e-4)), frames[i])
            assert len(pool) <= 2
    alone = VideoPool()
    cursor = alone.cursor()
    for time in times:
        cursor.read(path, time, 1e-4)
    assert pool.frames_decoded == 10 * alone.frames_decoded
    most = 3 + FRAMES // video_file.PACKETS_PER_READ  # to enter, to learn the rate, for packets, to see the end
    assert len(opened) <= 10 * most + 1
    pool.close()
    alone.close()


@pytest.mark.parametrize("scaling", ["area", "bilinear"])
@pytest.mark.parametrize("size", [(64, 64), (96, 40), (32, 48), (64, 96), (200, 100)])
def test_resized_frames_are_the_largest_of_their_aspect_ratio(video, size, scaling):
    path, times, _ = video("h264_b_frames")
    frame = decode_all(path)[1][7]
    height, width = fit(frame.height, frame.width, size)
    assert height == size[0] or width == size[1]
    assert abs(height / width - frame.height / frame.width) <= 1 / min(height, width)
    expected = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=scaling.upper())
    pool = VideoPool()
    np.testing.assert_array_equal(Resizer(size, scaling)(pool.cursor().read(path, times[7], 1e-4)), expected)
    pool.close()


def test_without_the_loop_filter_pictures_are_nearly_the_same_wherever_reading_begins(video):
    path, times, frames = video("h264_b_frames")
    pools = {skip: VideoPool(decoding=Decoding(skip_loop_filter=skip)) for skip in (False, True)}
    read = {skip: [rgb(pool.cursor().read(path, t, 1e-4)) for t in times] for skip, pool in pools.items()}
    assert all(np.array_equal(a, b) for a, b in zip(read[False], frames, strict=True))
    errors = [np.abs(a.astype(int) - b).mean() for a, b in zip(read[False], read[True], strict=True)]
    assert 0 < max(errors) < 4
    forward = pools[True].cursor()
    assert all(np.array_equal(rgb(forward.read(path, t, 1e-4)), b) for t, b in zip(times, read[True], strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here: tests/cuda has what it decodes")
def test_a_card_that_there_is_not_is_told_and_nothing_else_decodes_in_its_place(video):
    path, times, _ = video("h264_b_frames")
    cursor = VideoPool(decoding=Decoding(video_decoder="nvdec")).cursor()
    with pytest.raises(UserError, match="no card can be asked to decode") as told:
        cursor.read(path, times[0], 1e-4)
    assert told.value.where == "data.video_decoder=nvdec" and "cpu" in told.value.remedy


def test_each_pixel_is_the_mean_over_its_area():
    """Of a grey frame, which has no colours to be thinned out: 3 x 3 old pixels a new one."""
    fine = np.random.default_rng(0).integers(0, 256, (36, 90, 1), np.uint8).repeat(3, axis=2)
    read = Resizer((12, 30), "area")(av.VideoFrame.from_ndarray(fine, "rgb24")).astype(int)
    assert np.abs(read - fine.reshape(12, 3, 30, 3, 3).mean((1, 3))).max() <= 2
    assert np.abs(Resizer((12, 30))(av.VideoFrame.from_ndarray(fine, "rgb24")) - read).max() > 20


def test_pictures_of_one_block_belong_to_whoever_has_them(video):
    """Also where the size changes on the way, as from one file to another."""
    some = [video(name)[0] for name in ("h264_b_frames", "h264_grey")]
    frames = [f for path in some for f in decode_all(path)[1][:5]]
    small = av.VideoFrame.from_ndarray(picture(0, 0, "x", (30, 50)), "rgb24")
    given = [*frames[:3], small, small, *frames[3:]]
    resizer = Resizer((32, 40))
    alone = [Resizer((32, 40))(frame).copy() for frame in given]
    found = list(resizer.all(iter(given), len(given) + 2))
    for i, picture_of_it in enumerate(found):
        np.testing.assert_array_equal(picture_of_it, alone[i])
        picture_of_it[:] = 255 - i
    assert [p.max() for p in found] == [255 - i for i in range(len(found))]
    assert list(resizer.all(iter([]), 4)) == []


def test_still_images_become_rgb_and_depth_is_no_image():
    colour = picture(0, 0, "x", (32, 48))
    np.testing.assert_array_equal(decode_image(png(colour)), colour)
    grey = colour[..., 0]
    np.testing.assert_array_equal(decode_image(png(grey)), np.repeat(grey[..., None], 3, -1))
    depth = grey.astype(np.uint16) * 256 + 7
    with pytest.raises(DepthError, match="16 bits"):
        decode_image(png(depth))
    with pytest.raises(ImageError):
        decode_image(png(colour)[:60])
    with pytest.raises(ImageError):
        decode_image(b"")
