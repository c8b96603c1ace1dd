import json

from PIL import Image

from opentau_train.tools import report


def test_curves_of_a_run_become_one_picture(tmp_path):
    rows = [{"step": s, "time": 0.0, "Training/MSE": 1.0 / s, "Training/GradNorm": None} for s in (1, 2, 3)]
    rows.append({"step": 3, "time": 0.0, "Validation/a/joint/MSE": 0.5, "Validation/r::joint/MSE": 0.5})
    rows[-1]["Validation/a/joint/MSE/StdErr"] = 0.1
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.read_curves(tmp_path)["Training/MSE"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert report.main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").size[0] > 1000


def test_a_directory_without_numbers_is_a_mistake(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no numbers there" in capsys.readouterr().err


def test_a_file_that_is_there_is_overwritten_only_when_told(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 0.0, "Training/MSE": 1.0}) + "\n")
    out = tmp_path / "x.png"
    out.write_text("mine")
    assert report.main([str(tmp_path), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err and out.read_text() == "mine"
    assert report.main([str(tmp_path), "--out", str(out), "--force"]) == 0
    assert Image.open(out).size[0] > 1000


def test_a_place_that_cannot_be_written_is_a_mistake(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 0.0, "Training/MSE": 1.0}) + "\n")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "none" / "x.png")]) == 2
    assert "error: can't write" in capsys.readouterr().err
