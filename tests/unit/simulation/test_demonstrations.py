"""Demonstrations are a dataset that trains, the same for any number of simulators."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.data.mixture.open import open_mixture
from opentau_train.errors import EXIT_OK, EXIT_USER, UserError
from opentau_train.simulation.demonstrations import Wanted, write
from opentau_train.tools import demos
from tests.lerobot_writer import decode_all
from tests.simulators import line


def written(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files_for_any_simulators_and_crashes(tmp_path):
    write(tmp_path / "one", line(), Wanted(12), 1, 60.0)
    write(tmp_path / "three", line(), Wanted(12), 3, 60.0)
    write(tmp_path / "other", line(), Wanted(12, seed=1), 3, 60.0)
    one, three, other = (written(tmp_path / name) for name in ("one", "three", "other"))
    assert one == three and one.keys() == other.keys() and one != other
    crashing = {**line(), "env": {**line()["env"], "folder": str(tmp_path), "crash": 5}}
    write(tmp_path / "crashed", crashing, Wanted(12), 2, 60.0)
    videos = {path for path in one if path.suffix == ".mp4"}
    assert len(videos) == 2 and all(written(tmp_path / "crashed")[path] == one[path] for path in videos)


def test_the_expert_is_written_and_the_noise_is_executed(tmp_path):
    """Clean actions, noisy states: what was done next mends what went wrong."""
    write(tmp_path / "set", line(), Wanted(3, hold=4), 2, 60.0)
    settings = load_settings(cli.compose(["+recipe=lerobot", f"data.sources.main.root={tmp_path / 'set'}"]))
    mixture = open_mixture(settings)
    (dataset,) = mixture.datasets
    assert (
        mixture.spec.cameras == ("eye",)
        and dataset.source.fps == 10
        and mixture.groups[0].norm_head == "point::default"
    )
    assert next(iter(dataset.source.prompts(np.arange(1)))) == "come here"
    for _, state, actions in dataset.columns(np.arange(3)):
        np.testing.assert_array_equal(state, actions)  # the expert of the line
        executed = state[:-1] - state[1:] - state[:-1].clip(-0.1, 0.1)
        assert 0.001 < np.abs(executed).max() < 0.05
        assert (np.abs(state[-3:]) < 0.06).all() and len(state) > 6  # it stayed at the goal
    (video,) = (tmp_path / "set").rglob("*.mp4")
    assert len(decode_all(video)[1]) == sum(len(state) for _, state, _ in dataset.columns(np.arange(3)))
    told = json.loads((tmp_path / "set" / "meta" / "info.json").read_text())
    assert told["simulation"] == {"env": json.loads(json.dumps(line())), "seed": 0, "hold": 4}


def test_an_expert_that_fails_is_told(tmp_path):
    with pytest.raises(UserError) as error:
        write(tmp_path / "set", {**line(), "max_steps": 3}, Wanted(3, patience=5), 2, 60.0)
    assert "failed in 5 attempts in a row" in str(error.value) and "env.max_steps" in str(error.value)
    with pytest.raises(UserError, match="no expert is known"):
        write(tmp_path / "set", {**line(), "expert": None}, Wanted(3), 1, 60.0)


@pytest.mark.slow
def test_the_tool_writes_a_whole_dataset_or_none(tmp_path, capsys):
    words = ["env=reach", "episodes=2", f"out={tmp_path / 'set'}"]
    assert demos.main(words) == EXIT_OK and "2 episodes" in capsys.readouterr().out
    assert demos.main(words) == EXIT_USER and "is there already" in capsys.readouterr().err
    assert demos.main([*words, f"out={tmp_path / 'no'}", "env.success=x"]) == EXIT_USER
    assert "no 'x'" in capsys.readouterr().err and sorted(p.name for p in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["env=reech", "out=X"], ["simulation=reech", "did you mean 'reach'?"]),
        (["env=reach"], ["out is required"]),
        (["env=reach", "out=X", "episode=3"], ["unknown key 'episode'", "did you mean 'episodes'?"]),
        (["env=reach", "out=X", "episodes=0"], ["episodes must be greater than 0"]),
        (["env=reach", "out=X", "env.max_step=3"], ["env.max_step", "did you mean 'max_steps'?"]),
        (["out=X"], ["env is required"]),
        (["env=reach", "--out", "X"], ["'--out' is not KEY=VALUE"]),
    ],
)
def test_a_mistake_on_the_command_line_is_told(words, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demos.main(words) == EXIT_USER
    told = capsys.readouterr().err
    assert all(text in told for text in texts), told
    assert not list(tmp_path.iterdir())
