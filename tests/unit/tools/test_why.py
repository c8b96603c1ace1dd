"""`tools.why` on a real run: the table and the frames are those of the samples."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.recorder import read_step
from opentau_train.tools import why
from tests.program import TOY, train_here


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    arguments = [*TOY, "trainer.steps=3", "validation.every=0", "flight_recorder=true"]
    return train_here(arguments, tmp_path_factory.mktemp("why") / "run")


def test_lists_the_worst_samples_first(run, capsys):
    assert why.main([str(run), "--step", "2", "--top", "3"]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2: loss ")
    assert "median of the 2 steps around it" in lines[0]
    worst = read_step(run, 2).worst(3)
    header, *rows = lines[2:]
    assert [row.split()[header.split().index("t")] for row in rows] == [str(s.t) for s in worst]
    assert [row.split()[header.split().index("dataset")] for row in rows] == [s.dataset for s in worst]


def test_the_strip_shows_the_samples_frames(run, tmp_path, capsys):
    out = tmp_path / "strip.png"
    assert why.main([str(run), "--step", "3", "--top", "2", "--out", str(out)]) == EXIT_OK
    picture = np.asarray(Image.open(out))
    assert picture.shape[1:] == (2 * why.TILE[1], 3)
    with_two_cameras = why.CAPTION + 2 * why.TILE[0]
    assert picture.shape[0] in (why.CAPTION + why.TILE[0], with_two_cameras)
    for place in range(2):
        tile = picture[why.CAPTION : why.CAPTION + why.TILE[0], place * why.TILE[1] : (place + 1) * why.TILE[1]]
        assert tile.std() > 5  # an image, not a blank


@pytest.mark.parametrize("step", ["0", "99"])
def test_a_step_that_was_not_recorded_is_a_user_error(run, step, capsys):
    assert why.main([str(run), "--step", step]) == EXIT_USER
    assert "steps 1 to 3" in capsys.readouterr().err


def test_no_samples_to_show_is_a_user_error(run, tmp_path, capsys):
    assert why.main([str(run), "--step", "1", "--top", "0", "--out", str(tmp_path / "x.png")]) == EXIT_USER
    assert "--top must be at least 1" in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_a_user_error(tmp_path, capsys):
    assert why.main([str(tmp_path), "--step", "1"]) == EXIT_USER
    assert "flight_recorder=true" in capsys.readouterr().err
