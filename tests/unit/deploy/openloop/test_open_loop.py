"""Predicted beside recorded chunks of a dataset, of a policy and of its server: the same, and drawn in one page."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from opentau_train import load_policy
from opentau_train.config.data import SourceSettings
from opentau_train.data.lerobot import LeRobotSource
from opentau_train.deploy.openloop.page import page
from opentau_train.deploy.openloop.recording import Recording
from opentau_train.pages.drawing import ticks
from opentau_train.tools import record, replay_dataset
from opentau_train.types import WindowSpec
from tests.lerobot_writer import Dataset, vector, write
from tests.program import TINY_POLICY, train_here
from tests.served import serving


@pytest.fixture(scope="module")
def data(own_run):
    return own_run.parent / "set"


@pytest.fixture(scope="module")
def stored(own_run, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("record") / "chunks.npz"
    assert record.main([f"dataset={data}", f"checkpoint={own_run}", f"out={out}", "episodes=2", "every=5"]) == 0
    return out


@pytest.mark.slow
def test_the_chunks_are_those_of_act_for_the_datasets_own_windows(stored, data, policy):
    made = Recording.load(stored)
    assert made.episode.tolist() == [0, 0, 0, 1, 1] and made.frame.tolist() == [0, 5, 10, 0, 5]
    factory = LeRobotSource().open("set", SourceSettings(root=str(data))).cursors(WindowSpec(8, 1))
    cursor = factory.cursor()
    for row, (episode, frame) in enumerate(zip(made.episode.tolist(), made.frame.tolist(), strict=True)):
        window = cursor.read(episode, frame)
        seen = {**window.images, "state": window.state, "task": window.prompts[0].split(" | ")[0]}
        np.testing.assert_array_equal(made.predicted[row], policy.act(seen))
        np.testing.assert_array_equal(made.recorded[row], window.actions)
        np.testing.assert_array_equal(made.is_pad[row], window.is_pad)
    cursor.close()
    factory.close()
    assert made.about["action_names"] == list(policy.action_names) and made.second.tolist()[1] == 5 / 30


@pytest.mark.slow
def test_a_server_gives_what_the_policy_does(stored, own_run, data, tmp_path, capsys):
    with serving(own_run, "max_batch=1") as served:
        words = [
            f"dataset={data}",
            f"server={served.url}",
            f"out={tmp_path / 'chunks.npz'}",
            "episodes=[1,0]",
            "every=5",
        ]
        assert record.main(words) == 0
        page_of = [f"dataset={data}", f"server={served.url}", f"out={tmp_path / 'page.html'}", "episodes=1"]
        assert replay_dataset.main(page_of) == 0
        refused = [f"dataset={data}", f"server={served.url}", "norm_head=legs::joint", f"out={tmp_path / 'no.html'}"]
        assert replay_dataset.main(refused) == 2
    assert "set norm_head to one of arm::default" in capsys.readouterr().err
    own, other = Recording.load(stored), Recording.load(tmp_path / "chunks.npz")
    order = [3, 4, 0, 1, 2]
    np.testing.assert_array_equal(other.predicted, own.predicted[order])
    np.testing.assert_array_equal(other.recorded, own.recorded[order])
    assert other.about["policy"] == served.url and other.about["action_names"] == own.about["action_names"]


def test_errors_leave_out_what_is_past_the_end():
    pad = np.array([[False, False, True], [False, True, True]])
    recorded = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    predicted = recorded + np.array([[1, 2, 99], [3, 99, 99]], np.float32)[..., None]
    made = example(predicted, recorded, pad)
    assert made.mae.tolist() == [2.0] and made.mae_of_steps.tolist() == [[2.0], [2.0]]
    assert made.spread[0] == pytest.approx(np.std([0, 1, 3]))


def example(predicted, recorded, pad, name="grip<per>", unit="rad"):
    num = len(predicted)
    about = {"policy": "a & b", "dataset": "d", "norm_head": "arm::joint", "seed": 0, "fps": 10.0}
    about |= {"action_names": [name], "units": [unit], "state_names": []}
    zeros = np.zeros(num)
    where = np.arange(num) * 2, np.arange(num) * 0.2
    return Recording(predicted, recorded, pad, np.zeros((num, 0), np.float32), zeros.astype(int), *where, zeros, about)


@pytest.mark.slow
def test_the_page_is_whole_and_draws_what_was_recorded(stored, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert replay_dataset.main([f"recording={stored}", f"out={out}"]) == 0
    made, text = Recording.load(stored), out.read_text()
    assert f"MAE of action[0]: {made.mae[0]:.4g}" in capsys.readouterr().out and f"<td>{made.mae[0]:.4g}</td>" in text
    assert not re.search(r"<script|https?://(?!www\.w3)|src=|url\(", text) and "prefers-color-scheme: dark" in text
    plots = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S)]
    assert len(plots) == 3 + 2 * 3, "one of each dimension's error, and one of each in each episode"
    words = [t.text for t in plots[3].iter("text")]
    assert "time in episode 0 (s)" in words and "action[0]" in words
    drawn = [path for path in plots[3].iter("path") if path.get("class") == "predicted"]
    assert len(drawn) == 3 and drawn[0].get("d").count("L") == 7
    there = (~made.is_pad[2]).sum()
    assert drawn[2].get("d").count("L") == there - 1, "steps past the end aren't drawn"


def test_names_are_texts_in_the_page_and_units_stand_beside_them():
    chunks = np.zeros((2, 3, 1), np.float32)
    text = page(example(chunks, chunks, np.zeros((2, 3), bool)))
    assert "grip&lt;per&gt; (rad)" in text and "grip<per>" not in text and "a &amp; b" in text
    assert "<td>constant</td>" in text and "nan" not in text.lower()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.003, 0.0041), (1e6, 3e6), (-7.0, -6.9)])
def test_ticks_are_round_and_inside(low, high):
    made = ticks(low, high, 4)
    assert 2 <= len(made) <= 6 and low - 1e-6 * abs(low) <= made[0] and made[-1] <= high + 1e-6 * abs(high)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["checkpoint=RUN"], "dataset is required"),
        (["dataset=SET"], "one of checkpoint and server must be set"),
        (["dataset=SET", "checkpoint=RUN", "server=ws://x"], "one of checkpoint and server must be set"),
        (["dataset=/nowhere", "checkpoint=RUN"], "/nowhere"),
        (["dataset=SET", "checkpoint=RUN", "episodes=[99]"], "the dataset has no episode 99"),
        (["dataset=SET", "checkpoint=RUN", "source.state=[]"], "the dataset's state are (none), and the policy's"),
        (["dataset=SET", "checkpoint=RUN", "source.stat=[]"], "stat"),
        (["dataset=SET", "server=ws://127.0.0.1:1"], "no server answers"),
        (["recording=SET", "dataset=SET"], "a recording has its dataset and policy"),
        (["recording=SET/meta/info.json"], "no recording is there"),
        (["recording=SET", "out=/proc/x/y.html"], "can't write /proc/x/y.html"),
    ],
)
def test_a_mistake_is_told_in_three_lines(words, what, own_run, data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [word.replace("RUN", str(own_run)).replace("SET", str(data)) for word in words]
    assert replay_dataset.main(given) == 2
    told = capsys.readouterr().err
    assert what in told and len(told.strip().splitlines()) <= 3 and not list(tmp_path.iterdir())


def test_units_are_those_that_the_dataset_declares(tmp_path):
    """Of several robots, one at another rate, and a convention of the training's own, which the page undoes."""
    columns = {"observation.state": vector(4), "action": vector(3, 0.5)}
    root = write(tmp_path / "set", Dataset(lengths=(30, 30), cameras={}, columns=columns))
    words = ["+recipe=lerobot", f"data.sources.main.root={root}", *TINY_POLICY, "data.num_workers=0"]
    words += ["trainer.global_batch_size=2", "trainer.steps=1", "scheduler.warmup_steps=0", "validation.every=0"]
    parts = "[{kind: joint, dims: 2, unit: deg, reference: absolute}, {kind: gripper, range: [0, 100]}]"
    words += [f"data.sources.main.convention.actions={parts}", "data.sources.main.val_split_ratio=0.0"]
    run = train_here([*words, "data.sources.main.chunk_length=6", "data.sources.main.fps=10"], tmp_path / "run")
    out = tmp_path / "chunks.npz"
    assert record.main([f"dataset={root}", f"checkpoint={run}", f"out={out}", "episodes=1"]) == 0
    made = Recording.load(out)
    assert made.about["units"] == ["deg", "deg", ""] and made.about["fps"] == 10.0
    assert made.frame.tolist() == [0, 18] and made.predicted.shape == (2, 6, 3), "six steps of ten a second are 18 rows"
    np.testing.assert_allclose(made.recorded[0, :, 0], 0.5 + 3 * np.arange(6))
    assert load_policy(run).fps == 10.0
