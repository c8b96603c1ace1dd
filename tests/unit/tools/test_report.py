"""`tools.report`: what runs left is on the page, and nothing of it is more than text."""

from __future__ import annotations

import contextlib
import json
import re
from html import unescape
from pathlib import Path

import pytest

from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.pages import charts
from opentau_train.tools import report
from opentau_train.tools.reporting.runs import read_runs


def write(folder: Path, settings: str = "", **extra: object) -> Path:
    """A run directory of ten steps, two validations and two attempts."""
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "time": 100.0 * s, "attempt": 1 + s // 6, "Training/Loss": 1.0 / s, "Training/MSE": 1.0 / s}
        | {"Training/a/joint/MSE": 1.0, "Training/GradNorm": 10.0 - s, "Training/LearningRate": 1e-3}
        | {"Training/Epoch": s / 5, "Timing/DataWait": 0.1, "Timing/Step": 0.4, "Training/SamplesPerSecond": 80.0}
        for s in range(1, 11)
    ]
    for step, loss in ((5, 0.25), (10, 0.5)):
        rows.append({"step": step, "time": 100.0 * step + 30, "attempt": 1 + step // 6, "Validation/Loss": loss})
        rows[-1] |= {
            "Validation/a/joint/MSE": loss,
            "Validation/r::joint/MSE": loss,
            "Validation/a/joint/MSE/StdErr": 0.05,
        }
    rows[-1] |= {"Validation-Action/a/joint/MAE_rad": 0.3, "Validation-Action/a/joint/MAE_rad/First": 0.1, **extra}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"trainer: {{steps: 20}}\npaths: {{run_dir: {folder.name}}}\n{settings}")
    return folder


def drawn(text: str) -> dict:
    """What the page's script draws."""
    (data,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', text, flags=re.S)
    return json.loads(data)


def chart(text: str, title: str) -> dict:
    (made,) = [c for c in drawn(text)["charts"] if c["title"] == title]
    return made


def tables(text: str) -> list[list[str]]:
    """The rows of all tables, a list of cells each."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, flags=re.S)
    return [
        [unescape(re.sub(r"<[^>]+>", "", c)) for c in re.findall(r"<t[hd].*?</t[hd]>", r, flags=re.S)] for r in rows
    ]


@pytest.fixture
def page(tmp_path, capsys):
    def make(*runs: Path | str) -> str:
        out = tmp_path / "out" / "report.html"
        assert report.main([*map(str, runs), "--out", str(out), "--force"]) == EXIT_OK
        assert str(out) in capsys.readouterr().out
        return out.read_text()

    return make


def test_the_numbers_of_each_run_are_drawn_on_axes_with_units(tmp_path, page):
    text = page(write(tmp_path / "x"), write(tmp_path / "y"))
    assert [series["name"] for series in drawn(text)["series"]] == ["x", "y"]
    loss = chart(text, "Training MSE")
    assert [curve["series"] for curve in loss["curves"]] == [0, 1]
    assert loss["curves"][0]["x"]["step"] == list(range(1, 11)) and loss["curves"][0]["y"][1] == 0.5
    assert loss["curves"][0]["x"]["epoch"][4] == 1.0
    held_out = chart(text, "Held-out MSE, a/joint")["curves"][1]
    assert held_out["y"] == [0.25, 0.5] and held_out["errors"] == [0.05, 0.05]
    assert chart(text, "Wait for data, share of a step")["curves"][0]["y"] == pytest.approx([25.0] * 10)
    assert chart(text, "Mean absolute error in rad, a/joint")["unit"] == "rad"
    assert not [c for c in drawn(text)["charts"] if "::" in c["title"] or not c["unit"]]


def test_hours_leave_out_what_lay_between_attempts(tmp_path):
    ((run,), _) = read_runs([write(tmp_path / "x")])
    hours = run.curve("Training/Loss").x["hours"]
    assert hours[4] == pytest.approx(430 / 3600) and hours[5] == hours[4], "step 6 begins the second attempt"
    assert run.attempts == 2 and run.hours == pytest.approx(860 / 3600)


def test_results_name_what_was_changed_and_the_best_run_comes_first(tmp_path, page):
    write(tmp_path / "sweep" / "0", "optimizer: {lr: 0.1}\n")
    write(tmp_path / "sweep" / "1", "optimizer: {lr: 0.2}\n", **{"Validation/Loss": 0.125})
    (tmp_path / "sweep" / "multirun.yaml").write_text("not a run")
    for given in ([tmp_path / "sweep"], sorted((tmp_path / "sweep").iterdir())):
        text = page(*given)
        assert [series["name"] for series in drawn(text)["series"]] == ["sweep/0 (lr=0.1)", "sweep/1 (lr=0.2)"]
        head, first, second, *rest = tables(text)
        assert head[:4] == ["run", "steps", "time", "optimizer.lr"] and "paths.run_dir" not in head
        assert first[0] == "sweep/1" and first[1] == "10 of 20" and first[3] == "0.2"
        assert dict(zip(head, first))["lowest"] == "0.125" and dict(zip(head, first))["at step"] == "10"
        assert dict(zip(head, second))["held-out loss, last"] == "0.5" and dict(zip(head, second))["lowest"] == "0.25"
        assert ["optimizer.lr", "0.1", "0.2"] in rest


def test_a_source_that_one_run_has_is_one_difference(tmp_path, page):
    sources = "data: {sources: {a: {root: /x, weight: 1}, b: {root: /y}}}\n"
    text = page(write(tmp_path / "x", sources), write(tmp_path / "y", "data: {sources: {a: {root: /x, weight: 2}}}\n"))
    assert [row for row in tables(text) if row[0].startswith("data.")] == [
        ["data.sources.a.weight", "1", "2"],
        ["data.sources.b", "present", "–"],
    ]


def test_what_was_replaced_and_saved_is_told(tmp_path, page):
    run = write(tmp_path / "x y")
    bad = [{"dataset": "a", "episode": e, "frame": 0, "cause": "no <moov>"} for e in (3, 3, 4)]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad) + '{"cut')
    (run / "checkpoints" / "00000005").mkdir(parents=True)
    (run / "checkpoints" / "last").symlink_to("00000005")
    (run / "flight").mkdir()
    (run / "flight" / "rank00000-000001.jsonl").write_text("")
    text = page(run)
    assert ["a", "3", "no <moov>", "2"] in tables(text) and "no <moov>" not in text
    assert "00000005 (last)" in text and 'href="../x%20y/flight/"' in text
    assert f"tools.why &#x27;{run}&#x27; --step 1<" in text, "the step of the largest gradient"


def test_sampled_chunks_of_runs_are_drawn_beside_the_recorded_one(tmp_path, page):
    runs = [write(tmp_path / name) for name in "xy"]
    for number, run in enumerate(runs):
        (run / "plots").mkdir()
        panels = [
            {"place": p, "name": "j [rad]", "true": [0.0, 4.0], "predicted": [number, None]} for p in ("w0", "w1")
        ]
        (run / "plots" / "actions_00000010.json").write_text(json.dumps(panels))
    made = chart(page(*runs), "j, w1")
    assert [(c["series"], c["y"]) for c in made["curves"]] == [(-1, [0.0, 4.0]), (0, [0.0, None]), (1, [1.0, None])]
    assert made["unit"] == "rad" and made["low"] < 0.0 and made["high"] > 4.0


HOSTILE = "</script><script>alert(1)</script> \"'<b> é 引"


def test_hostile_names_and_texts_stay_texts(tmp_path, page):
    run = write(
        tmp_path / HOSTILE.replace("/", "_"),
        json.dumps({"name": HOSTILE})[1:-1] + "\n",
        **{f"Validation/{HOSTILE.replace('/', '_')}/joint/MSE": 1.0},
    )
    (run / "quarantine.jsonl").write_text(json.dumps({"dataset": HOSTILE, "episode": 1, "cause": HOSTILE}) + "\n")
    (run / "plots").mkdir()
    panel = {"place": HOSTILE, "name": HOSTILE, "true": [0.0], "predicted": [1.0]}
    (run / "plots" / "actions_00000010.json").write_text(json.dumps([panel]))
    text = page(run, write(tmp_path / "other", "name: x\n"))
    assert len(re.findall(r"<script", text)) == 3 and "<b>" not in text.partition("<script>")[0]
    assert HOSTILE in "".join(c["title"] for c in drawn(text)["charts"])
    assert [HOSTILE, "1", HOSTILE, "1"] in tables(text)


def test_long_curves_are_thinned_to_means():
    curve = charts.Curve(0, {"step": [float(i) for i in range(5000)]}, [1.0, None, 3.0, 5.0] * 1250)
    made = curve.thinned(2000)
    assert len(made.y) == len(made.x["step"]) <= 2000 and made.x["step"][-1] == 4999.0
    assert made.y[0] == 2.0 and made.y[1] == 3.0, "of 1 and 3, of 5, 1 and nothing"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["EMPTY"], "no numbers there"),
        (["RUN", "--out", "THERE"], "is there already"),
        (["RUN", "--out", "x.png"], "x.png names no page"),
        (["RUN", "--out", "FILE/x/y.html"], "error: can't write"),
        (["BROKEN"], "the settings can't be read"),
        ([], "the following arguments are required: RUN"),
        (["RUN", "--ot", "x.html"], "unrecognized arguments: --ot x.html"),
    ],
)
def test_mistakes_are_told_and_nothing_is_overwritten(words, told, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "THERE").with_suffix(".html").write_text("mine")
    (tmp_path / "FILE").write_text("")
    write(tmp_path / "RUN")
    write(tmp_path / "BROKEN", "a: [}")
    places = [str(tmp_path / w) + (".html" if w == "THERE" else "") if w.split("/")[0].isupper() else w for w in words]
    with contextlib.suppress(SystemExit):  # of a wrong command line, with this code too
        code = EXIT_USER
        code = report.main([*places, *(["--out", str(tmp_path / "new.html")] if "--out" not in words else [])])
    assert code == EXIT_USER
    error = capsys.readouterr().err
    assert told in error and error.startswith("error: ") and "remedy: " in error
    assert (tmp_path / "THERE.html").read_text() == "mine" and not (tmp_path / "new.html").exists()


def test_without_plotly_the_report_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    assert report.main([str(write(tmp_path / "x")), "--out", str(tmp_path / "r.html")]) == EXIT_USER
    assert "opentau_train[report]" in capsys.readouterr().err and not (tmp_path / "r.html").exists()
