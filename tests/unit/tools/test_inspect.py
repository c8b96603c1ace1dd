"""`tools.inspect --out FILE.png`: the sheet's pictures are those of the run's batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opentau_train.data.batch import stack
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.tools import inspect
from opentau_train.tools.inspecting import sheet as drawing
from opentau_train.types import Address
from tests.modal import MODAL
from tests.program import DATA, TOY
from tests.unit.data.load.test_real_stream import mixture

ARGUMENTS = ["data/augment=droid_cosmos", "data.history=1", "data.dropout.camera=0.4"]


def test_shows_each_camera_and_frame_as_validation_and_training_see_it(tmp_path, capsys):
    out = tmp_path / "sheets" / "sheet.png"
    assert inspect.main([*TOY, *ARGUMENTS, "--out", str(out), "--samples", "3"]) == EXIT_OK
    assert capsys.readouterr().out.strip() == str(out)
    sheet = np.asarray(Image.open(out))
    opened = mixture(tmp_path, *ARGUMENTS)
    zoom, side = 6, 2 * 192  # pictures of 32x32, two frames
    windows, cameras = opened.tape(4).windows(np.arange(3)), len(opened.spec.cameras)
    block = cameras * (drawing.LINE + 192) + 2 * drawing.LINE + drawing.GAP
    assert sheet.shape == (3 * block, 2 * side + drawing.GAP, 3)
    dropped = 0
    for row in range(3):
        where = (int(c[row]) for c in (windows.dataset, windows.episode, windows.frame, windows.pass_index))
        address = Address(*where)
        for training, left in ((False, 0), (True, side + drawing.GAP)):
            builder = SampleBuilder(opened, training=training)
            batch = stack([builder.build(0, address)], opened.spec)
            builder.close()
            for place, frames in enumerate(batch.images.values()):
                top = row * block + place * (drawing.LINE + 192) + drawing.LINE
                shown = sheet[top : top + 192, left : left + side][zoom // 2 :: zoom, zoom // 2 :: zoom]
                assert np.array_equal(shown, np.concatenate(list(frames[0].movedim(1, -1).numpy()), axis=1))
                dropped += training and not shown.any()
    assert dropped
    captions = sheet[block - 2 * drawing.LINE - drawing.GAP : block - drawing.GAP]
    assert captions[: drawing.LINE].any() and captions[drawing.LINE :].any()


def test_shows_the_future_of_samples_that_have_one_behind_their_frames(tmp_path, capsys):
    out, words = tmp_path / "sheet.png", [*MODAL, "data.sources.main.mode=wam", "data.future.cameras=[wrist]"]
    assert inspect.main([*TOY, *words, "--out", str(out), "--samples", "6"]) == EXIT_OK
    sheet, opened = np.asarray(Image.open(out)), mixture(tmp_path, *words)
    windows, height = opened.tape(4).windows(np.arange(6)), 2 * (drawing.LINE + 192) + 2 * drawing.LINE + drawing.GAP
    assert sheet.shape == (6 * height, 2 * 3 * 192 + drawing.GAP, 3)
    builder = SampleBuilder(opened, training=False)
    for row in range(6):
        where = (int(c[row]) for c in (windows.dataset, windows.episode, windows.frame, windows.pass_index))
        sample = builder.build(0, Address(*where))
        future = stack([sample], opened.spec).future["wrist"][0].movedim(1, -1).numpy()
        for camera, wanted in (("front", np.zeros_like(future)), ("wrist", future)):
            top = row * height + drawing.LINE + (camera == "wrist") * (drawing.LINE + 192)
            shown = sheet[top : top + 192, 192 : 3 * 192][3::6, 3::6]
            assert np.array_equal(shown, np.concatenate(list(wanted), axis=1))
        assert future.any() == (sample["mode"] == "wam")
    builder.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--samples", "0"], "--samples must be at least 1"),
        (["--out", "sheet.txt"], "names no format of pictures"),
        (["--out", "x.png", "data.sources.main.cameras=[]", "data.sources.old.cameras=[]"], "the data have no cameras"),
        (["data/augment=openpie"], "openpie"),
    ],
)
def test_mistakes_are_told_with_a_remedy(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert inspect.main([*TOY, *words]) == EXIT_USER
    told = capsys.readouterr().err
    assert expected in told and not list(Path().iterdir())


def test_a_sample_that_cannot_be_read_is_told_and_left_out(tmp_path, capsys):
    import shutil

    root = tmp_path / "data"
    shutil.copytree(DATA / "lerobot_v30", root)
    for video in root.rglob("*.mp4"):
        video.write_bytes(video.read_bytes()[:200])
    words = ["+recipe=lerobot", f"data.sources.main.root={root}", "data.sources.main.val_split_ratio=0"]
    assert inspect.main([*words, "--out", str(tmp_path / "sheet.png"), "--samples", "2"]) == EXIT_USER
    told = capsys.readouterr().err
    assert "none of the samples can be read" in told and ".mp4" in told
