"""`tools.inspect`: the page says of a mixture what is in its files, and only that."""

from __future__ import annotations

import base64
import io
import re
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.tools import inspect
from opentau_train.tools.inspecting import rows
from tests.lerobot_writer import Camera, Dataset, vector, write

HOSTILE = "</script><script>alert(1)</script> \"'<b> é 引き出し"
LENGTHS = (40, 30, 50, 30)
FAR = (2, 7, 500.0)
"""Episode, frame and value of what is far from the rest."""


def state(episode: int, frame: int) -> list[float]:
    """Waves, the third episode's with one far value; the second and the fourth episode are the same."""
    phase = frame / 7 + (0 if episode in (1, 3) else episode)
    far = FAR[2] if (episode, frame) == FAR[:2] else 0.0
    return [np.sin(phase), np.cos(phase) + far, 0.5]


def dataset(root: Path, **columns) -> Path:
    """A small dataset with one camera and a hostile task; its columns are `columns` or waves."""
    feature, _ = vector(3, names=["a", "b", "still"])
    made = {"observation.state": (feature, state), "action": (feature, lambda e, f: state(e, f + 1))} | columns
    write(root, Dataset(lengths=LENGTHS, cameras={"observation.images.front": Camera(size=(32, 48))}, columns=made))
    path = root / "meta" / "tasks.parquet"
    tasks = pq.read_table(path)
    text = [HOSTILE if i == 0 else "plain" for i in range(len(tasks))]
    name = next(c for c in tasks.column_names if pa.types.is_string(tasks.schema.field(c).type))
    pq.write_table(tasks.set_column(tasks.column_names.index(name), name, pa.array(text)), path)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("inspected") / "set")


def words(root: Path, *more: str) -> list[str]:
    cache = f"paths.cache_dir={root.parent / 'cache'}"
    return ["+recipe=lerobot", f"data.sources.main.root={root}", "data.sources.main.val_episodes=[3]", cache, *more]


@pytest.fixture(scope="module")
def page(root):
    out = root.parent / "page.html"
    assert inspect.main([*words(root, "trainer.global_batch_size=4"), "--out", str(out), "--clips", "2"]) == EXIT_OK
    return out.read_text()


def plain(html: str) -> str:
    """Its text, without marks."""
    return unescape(re.sub(r"<[^>]+>", " ", html))


def test_duplicates_far_values_and_constants_are_named_by_episode(page):
    text = re.sub(r"\s+", " ", plain(page))
    assert "the rows of episodes 1, 3 are identical" in text
    assert f"episode {FAR[0]}, frame {FAR[1]}: 499 (normalised" in text and f"episode {FAR[0]}: 2 dimensions" in text
    assert "constant in all rows that were read" in text and "still" in text


def test_episodes_split_and_what_was_read_are_told(page):
    text = re.sub(r"\s+", " ", plain(page))
    assert "150 rows of 4 of 4 episodes" in text and "4 episodes of 30 (episode 1) to 50 frames (episode 2)" in text
    assert re.search(r"main 3 1 3 all none", text), "training, held out, which, frames in use, episodes without any"
    assert "main default arm::default 4 1 " in text


def test_every_dimension_is_drawn_raw_and_normalised(page):
    assert len(re.findall(r'<div class="pair">', page)) == 6
    raw = re.findall(r'aria-label="rows over (.*?)"', page)
    assert raw.count("normalised") == 6 and raw.count("raw") == 6 and ">observation.state.b<" in page
    counts = [int(n.replace(",", "")) for n in re.findall(r": ([\d,]+)</title></rect>", page)]
    assert sum(counts) == 2 * 6 * sum(LENGTHS) + len(LENGTHS), "rows of each drawing, and the episodes by length"


def test_clips_and_stills_are_films_of_the_episodes(page):
    images = [
        Image.open(io.BytesIO(base64.b64decode(x))) for x in re.findall(r'"data:image/webp;base64,([^"]+)"', page)
    ]
    *samples, first, stills, other, _ = images
    assert (
        len(samples) == 4
        and other.n_frames == 24
        and first.n_frames == 24
        and stills.size == (5 * first.size[0], first.size[1])
    )
    assert first.size == (192, 128) and samples[0].n_frames == 1
    first.seek(0)
    start = np.asarray(first.convert("RGB"), int)
    first.seek(23)
    assert np.abs(np.asarray(first.convert("RGB"), int) - start).mean() > 10, "frames differ"


def test_texts_of_the_dataset_stay_texts_and_no_script_runs(page):
    assert HOSTILE in plain(page) and not re.search("<script|<b>|https?://(?!www.w3)", page)
    assert "script-src 'none'" in page


def test_a_keep_ranges_filter_and_values_that_are_no_numbers_are_told(tmp_path):
    feature, _ = vector(2)
    rows = feature, lambda e, f: [float("nan") if (e, f) == (1, 3) else f / 9, e]
    root = dataset(tmp_path / "set", **{"observation.state": rows})
    ranges = tmp_path / "keep.json"
    ranges.write_text('{"0": [[0, 20]], "1": [[0, 30]], "2": [[0, 50]]}')
    out = tmp_path / "page.html"
    chosen = [
        "data.sources.main.use_filter_dict=true",
        f"data.sources.main.filter_dict_path={ranges}",
        "data.sources.main.val_episodes=[2]",
    ]
    assert inspect.main([*words(root, *chosen), "--out", str(out), "--clips", "0"]) == EXIT_OK
    text = re.sub(r"\s+", " ", plain(out.read_text()))
    assert "NaN or infinities in episodes 1" in text and "a training ends here" in text and "is nan in dataset" in text
    assert "66.7% in 3 runs 3" in text, "100 of 150 frames, and none of episode 3"


def test_of_data_too_large_for_its_statistics_the_rows_that_were_read_are_normalised_by_their_own(
    root, tmp_path, monkeypatch, page
):
    monkeypatch.setattr(rows, "MOST_FOR_STATISTICS", 100)
    out = tmp_path / "page.html"
    chosen = ["--clips", "0", "--samples", "1", "--episodes", "2"]
    assert inspect.main([*words(root), *chosen, "--out", str(out)]) == EXIT_OK
    text = re.sub(r"\s+", " ", plain(out.read_text()))
    assert "70 rows of 2 of 4 episodes" in text and "statistics of at most 100 are computed here" in text
    assert out.read_text().count('aria-label="rows over normalised"') == 6 and "as in training" in plain(page)


def test_files_are_not_overwritten_and_mistakes_end_before_anything_is_read(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "there.rrd").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for more, told in (
        (["--out", "there.html"], "there.html is there already"),
        (["--rerun", "there.rrd"], "there.rrd is there already"),
        (["--episodes", "0"], "--episodes must be at least 1"),
        (["--out", "page"], "page names no page"),
    ):
        assert inspect.main([*words(root), *more]) == EXIT_USER
        assert told in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there.html", "there.rrd"]
    assert (tmp_path / "there.html").read_text() == "mine"


def test_without_rerun_the_tool_says_what_to_install(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert (
        inspect.main([*words(root), "--rerun", str(tmp_path / "x.rrd"), "--out", str(tmp_path / "x.html")]) == EXIT_USER
    )
    assert "opentau_train[rerun]" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_recording_has_the_frames_states_actions_and_tasks_of_the_episodes(root, tmp_path, capsys):
    """Read back with Rerun's own reader, which `make test-slow` installs."""
    from rerun.chunk import RrdReader

    out = tmp_path / "new" / "x.rrd"
    assert (
        inspect.main([*words(root), "--rerun", str(out), "--out", str(tmp_path / "x.png"), "--clips", "2"]) == EXIT_OK
    )
    assert f"{out}  (2 episodes; " in capsys.readouterr().out
    rows: dict[str, int] = {}
    values: dict[int, list[float]] = {}
    for chunk in RrdReader(out).stream():
        if not chunk.is_static:
            rows[chunk.entity_path] = rows.get(chunk.entity_path, 0) + chunk.num_rows
        if chunk.entity_path == "/main/episode_000003/state" and not chunk.is_static:
            batch = chunk.to_record_batch()
            (column,) = [name for name in batch.schema.names if "calars" in name]
            values |= dict(zip(batch["frame"].to_pylist(), batch[column].to_pylist(), strict=True))
    wanted = {0: 40, 3: 30}
    for part in ("state", "actions", "task", "cameras/front"):
        for episode, length in wanted.items():
            assert rows[f"/main/episode_{episode:06d}/{part}"] == length
    assert len(rows) == 8 and sorted(values) == list(range(30))
    np.testing.assert_allclose(values[11], state(3, 11), rtol=1e-6)
