"""The success rate beside the losses: as an evaluator, as a tool, and as what chooses the best checkpoint."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from opentau_train import validate
from opentau_train.checkpoints.best import Ranking
from opentau_train.distributed import stopping
from opentau_train.errors import EXIT_OK, EXIT_USER, UserError
from opentau_train.simulation import play
from opentau_train.simulation.demonstrations import Wanted, write
from opentau_train.tools import rollout
from opentau_train.types import Group
from opentau_train.validation.evaluator import Compared, Scores
from tests.program import TINY_POLICY, metrics, train_here
from tests.simulators import line

ENVIRONMENT = "validation.evaluator.rollout.environments.line"


def arguments(root, *more):
    """Of a small run on demonstrations of the line, which plays it as it learns."""
    return [
        "+recipe=lerobot",
        f"data.sources.main.root={root}",
        "data.num_workers=0",
        "trainer.global_batch_size=4",
        "trainer.steps=2",
        "validation.every=1",
        "validation.evaluators=[loss,rollout]",
        f"{ENVIRONMENT}={json.dumps(line())}".replace('"', ""),
        "validation.evaluator.rollout.episodes=5",
        "validation.evaluator.rollout.simulators=2",
        "validation.evaluator.rollout.videos=1",
        *TINY_POLICY,
        *more,
    ]


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory):
    root = tmp_path_factory.mktemp("line") / "set"
    write(root, line(), Wanted(8), 2, 60.0)
    return root


@pytest.fixture(scope="module")
def run(demonstrated, tmp_path_factory):
    """Its average plays, which is what a checkpoint has for a robot."""
    return train_here(arguments(demonstrated, "trainer.ema_decay=0.5"), tmp_path_factory.mktemp("run") / "run")


@pytest.mark.slow
def test_the_row_has_the_rate_its_interval_and_what_the_losses_say(run):
    row = metrics(run)[2]
    rate, low, high = (row[f"Rollout/line/Success{end}"] for end in ("", "/Low", "/High"))
    assert 0 <= low <= rate <= high <= 1 and row["Rollout/Success"] == rate and "Validation/Loss" in row
    assert (row["Rollout/line/Episodes"], row["Rollout/line/Replaced"]) == (5, 0) and row["Rollout/line/Length"] > 0
    for step in (1, 2):
        films = [run / "plots" / f"rollout_line_0_{step:08d}{suffix}" for suffix in (".png", ".mp4", ".gif")]
        assert all(film.is_file() for film in films)
        with av.open(str(films[1])) as video:
            assert Image.open(films[2]).n_frames >= sum(1 for _ in video.decode(video=0)) // 2


@pytest.mark.slow
def test_the_tool_and_a_validation_by_itself_measure_what_the_run_did(run, tmp_path, capsys):
    logged = metrics(run)[2]
    arguments = [f"checkpoint={run}", f"out={tmp_path / 'v.json'}", "validation.evaluators=[rollout]"]
    with pytest.raises(UserError, match=r"trust=\[tests.simulators\]"):  # no class of the program's own
        validate.run(arguments)
    validate.run([*arguments, "trust=[tests.simulators]"])
    measured = json.loads((tmp_path / "v.json").read_text())["metrics"]
    assert measured == {k: v for k, v in logged.items() if k.startswith("Rollout")}
    assert (tmp_path / "v_rollout_line_0.mp4").is_file()
    (tmp_path / "conf" / "simulation").mkdir(parents=True)
    declared = {**line(), "task": None, "prompt": "come here"}
    (tmp_path / "conf" / "simulation" / "line.yaml").write_text(json.dumps(declared))
    words = [f"checkpoint={run}", "env=line", f"--config-dir={tmp_path / 'conf'}", "episodes=5", "simulators=2"]
    assert rollout.main([*words, f"out={tmp_path / 'out'}"]) == EXIT_OK
    told = json.loads((tmp_path / "out" / "rollout.json").read_text())
    assert {k.replace("line", "Rollout/line", 1): v for k, v in told["metrics"].items()} == {
        k: v for k, v in measured.items() if k != "Rollout/Success"
    }
    assert sum(e["success"] for e in told["episodes"]) == round(5 * measured["Rollout/line/Success"])
    assert np.mean([e["steps"] for e in told["episodes"]]) == measured["Rollout/line/Length"]
    assert "of 5 reached the goal" in capsys.readouterr().out and (tmp_path / "out" / "episode_1.gif").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (["env.actions=[dx,dy]", "env.expert_noise=[]"], ["1 numbers of actions (dx), the environment 2 (dx, dy)"]),
        (["env.fps=20"], ["takes 20 actions a second", "trained on 10"]),
        (["env.cameras.eye=null", "env.cameras.nose=eye"], ["the policy has the cameras eye, the environment nose"]),
        (["norm_head=other"], ["wasn't trained on 'other'", "point::default"]),
        (["checkpoint=nowhere"], ["nowhere"]),
    ],
)
def test_a_policy_of_another_robot_is_refused(run, tmp_path, capsys, change, texts):
    (tmp_path / "simulation").mkdir()
    (tmp_path / "simulation" / "line.yaml").write_text(json.dumps(line()))
    words = [f"checkpoint={run}", "env=line", f"--config-dir={tmp_path}", f"out={tmp_path / 'out'}", *change]
    assert rollout.main(words) == EXIT_USER
    told = capsys.readouterr().err
    assert all(text in told for text in texts), told


@pytest.mark.slow
def test_an_evaluator_without_an_environment_says_how_to_name_one(demonstrated, tmp_path):
    words = [a for a in arguments(demonstrated) if not a.startswith(ENVIRONMENT)]
    with pytest.raises(UserError, match=r"\+simulation@validation\.evaluator\.rollout\.environments\.NAME=reach"):
        train_here(words, tmp_path / "run")
    remedy = "+simulation@validation.evaluator.rollout.environments.NAME=reach"
    with pytest.raises(UserError, match="the policy has 1 numbers"):
        train_here([*words, remedy], tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_is_stopped_in_its_episodes_owes_the_pass_and_goes_on(demonstrated, tmp_path, monkeypatch):
    """The stop comes while the first pass plays; resumed, the run has the numbers of one that went through."""
    whole = train_here(arguments(demonstrated), tmp_path / "whole")
    advance, run = play._advance, tmp_path / "run"
    monkeypatch.setattr(stopping, "POLL", 0.0)

    def stops(*arguments):
        monkeypatch.setattr(play, "_advance", advance)
        os.kill(os.getpid(), signal.SIGUSR1)
        return advance(*arguments)

    monkeypatch.setattr(play, "_advance", stops)
    with pytest.raises(AssertionError):
        train_here(arguments(demonstrated), run)  # its exit code says that it was stopped
    assert 1 not in {step for step, row in metrics(run).items() if "Rollout/Success" in row}
    train_here(arguments(demonstrated, "resume=auto"), run)
    rates = [
        {s: r["Rollout/line/Length"] for s, r in metrics(r).items() if "Rollout/Success" in r} for r in (whole, run)
    ]
    assert rates[0] == rates[1] and sorted(rates[0]) == [1, 2]


@pytest.mark.slow
def test_success_needs_no_held_out_windows_and_chooses_the_best(demonstrated, tmp_path):
    more = ["validation.evaluators=[rollout]", "validation.best=rollout/success", "data.sources.main.val_split_ratio=0"]
    run = train_here(arguments(demonstrated, *more, "checkpoint.every=1"), tmp_path / "run")
    rates = [metrics(run)[step]["Rollout/Success"] for step in (1, 2)]
    assert (run / "checkpoints" / "best").is_symlink() and (run / "checkpoints" / "lowest").is_symlink()
    with np.load(run / "passes" / "00000001.npz") as saved:
        assert list(saved["episodes"]) == [f"line/{e}" for e in range(5)]
        assert saved["sums"][0, :, 0, 0].mean() == pytest.approx(1 - rates[0])


def test_the_best_without_its_evaluator_is_refused(demonstrated, tmp_path):
    more = ["validation.evaluators=[loss]", "validation.best=rollout/success"]
    with pytest.raises(UserError, match=r"validation.evaluators=\[loss,rollout\]"):
        train_here(arguments(demonstrated, *more), tmp_path / "run")


def test_more_successes_than_chance_gives_become_the_best(tmp_path):
    """Paired over the same starts: 9 of 20 that are gained count, 1 doesn't."""
    compared = Compared(
        tuple(map(str, range(20))), np.zeros(20, int), (Group("line", "Rollout", "", 1.0),), (1.0,), np.arange(20)
    )
    ranking = Ranking(tmp_path, compared, 2.0)

    def scores(reached):
        failed = (np.arange(20) >= reached).astype(float)
        return Scores(failed.mean(), np.stack([failed, np.ones(20)], -1)[:, None])

    world = SimpleNamespace(is_main=True)
    improves = ["best" in ranking.update(world, step, scores(n)) for step, n in enumerate((5, 6, 14, 4, 14))]
    assert improves == [True, False, True, False, False]
