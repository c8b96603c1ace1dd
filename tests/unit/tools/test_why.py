"""`tools.why` on a real run: the table and the frames are those of the samples."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.tools import why
from opentau_train.tools.flight import read_step
from tests import warm
from tests.program import DATA, TOY, environment, train_here


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


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("strip", "strip names no format of pictures"),
        ("strip.txt", "strip.txt names no format of pictures"),
        ("file/strip.png", "can't write {}/file/strip.png: "),
    ],
)
def test_a_picture_that_can_t_be_written_is_refused_before_anything_is_read(tmp_path, capsys, out, said):
    (tmp_path / "file").write_text("")
    assert why.main([str(tmp_path / "no_run"), "--step", "1", "--out", str(tmp_path / out)]) == EXIT_USER
    error = capsys.readouterr().err
    assert said.format(tmp_path) in error and "where:  --out" in error and "remedy: " in error


def test_the_picture_s_directory_is_made(run, tmp_path):
    out = tmp_path / "not/there/strip.JPG"
    assert why.main([str(run), "--step", "1", "--top", "1", "--out", str(out)]) == EXIT_OK
    assert Image.open(out).format == "JPEG"


def test_a_disk_that_takes_no_picture_is_a_user_error(run, tmp_path, capsys):
    (tmp_path / "strip.png").mkdir()
    assert why.main([str(run), "--step", "1", "--top", "1", "--out", str(tmp_path / "strip.png")]) == EXIT_USER
    assert "can't write" in capsys.readouterr().err


@pytest.fixture
def moved(run, tmp_path) -> tuple[Path, Path]:
    """(A copy of the run whose dataset `main` was moved since, where that is now.)"""
    there = tmp_path / "run"
    (there / "flight").mkdir(parents=True)
    for path in (run / "flight").iterdir():
        shutil.copy(path, there / "flight")
    here = shutil.copytree(DATA / "lerobot_v30", tmp_path / "here")
    text = (run / "config.yaml").read_text()
    (there / "config.yaml").write_text(text.replace(str(DATA / "lerobot_v30"), "sets/lerobot_v30"))
    return there, here


def test_data_that_were_moved_are_named_by_an_override(run, moved, tmp_path, capsys):
    there, here = moved
    wanted, out = tmp_path / "wanted.png", tmp_path / "strip.png"
    assert why.main([str(run), "--step", "3", "--out", str(wanted)]) == EXIT_OK
    assert why.main([str(there), "--step", "3", "--out", str(out)]) == EXIT_USER
    error = capsys.readouterr().err
    assert "sets/lerobot_v30 doesn't exist" in error and "set data.sources.main.root=DIRECTORY" in error
    override = f"data.sources.main.root={here}"
    for given in ([str(there), override, "--step", "3"], [str(there), "--step", "3", override]):
        assert why.main([*given, "--out", str(out)]) == EXIT_OK
        assert out.read_bytes() == wanted.read_bytes()
        out.unlink()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.sources.main.rooot=/x", "did you mean 'root'"),
        ("data.sources.main.root", "can't read the argument 'data.sources.main.root'"),
        ("data.sources.main.root=/a,b", "is a sweep"),
        ("trainer.steps=3", "trainer.steps is the run's and can't be changed"),
    ],
)
def test_a_wrong_override_is_answered_as_by_the_program(run, tmp_path, capsys, override, said):
    assert why.main([str(run), "--step", "3", "--out", str(tmp_path / "x.png"), override]) == EXIT_USER
    assert said in capsys.readouterr().err


def test_an_override_without_use_is_refused(run, capsys):
    assert why.main([str(run), "--step", "3", "data.sources.main.root=/x"]) == EXIT_USER
    assert "add --out FILE" in capsys.readouterr().err


def test_a_garbled_line_is_named_on_stderr_and_the_rest_is_shown(moved):
    path = next((moved[0] / "flight").iterdir())
    path.write_bytes(b"garbled\n" + path.read_bytes())
    command = [sys.executable, "-m", "opentau_train.tools.why", str(moved[0]), "--step", "2"]
    done = warm.run(command, env=environment())
    assert done.returncode == EXIT_OK and done.stdout.startswith("step 2: loss "), done.stderr
    assert done.stderr == f"{path}, line 1 is garbled and passed over\n"
