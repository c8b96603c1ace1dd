"""`python -m opentau_train.tools.check`: what it says of a dataset's rows and pictures, and of what is declared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.support.arms import Arm, generate
from opentau_train.data.builtin import writer
from opentau_train.data.lint.sample import EpisodeSample
from opentau_train.tools.check import main
from tests.lerobot_writer import Camera, Dataset, write

DATA = Path(__file__).parents[2] / "data"
REAL = Path(__file__).parents[4] / "shared" / "real" / "gr00t_pick_n_place"
NUM, ROWS = 6, 45


def columns(values: Sequence[np.ndarray], names: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Of each episode {column: [L, D]}: the dimensions `column[i]` side by side."""
    keys = list(dict.fromkeys(name.partition("[")[0] for name in names))
    of = {key: [i for i, name in enumerate(names) if name.partition("[")[0] == key] for key in keys}
    return [{key: v[:ROWS, places].astype(np.float32) for key, places in of.items()} for v in values]


def write_arm(root: Path, sample: EpisodeSample, pictures: Sequence[dict[str, np.ndarray]] = ({},) * NUM) -> Path:
    """The first episodes of a generated source as a dataset; `pictures` {camera: [H, W, 3]} of each episode's rows."""
    rows = [
        s | a for s, a in zip(columns(sample.state, sample.state_names), columns(sample.actions, sample.action_names))
    ]
    features = {key: writer.Feature("float32", (v.shape[1],)) for key, v in rows[0].items()}
    cameras = {key: Camera(codec=None, size=(32, 32)) for key in pictures[0]}
    layout = writer.Layout(features, cameras, int(sample.fps), robot_type="arm", episodes_per_data_file=2)
    episodes = [
        writer.Episode("pick", ROWS, r | {key: np.repeat(image[None], ROWS, axis=0) for key, image in p.items()})
        for r, p in zip(rows[:NUM], pictures)
    ]
    writer.write_tables(root, layout, episodes)
    return root


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Path:
    """Joints and a gripper, absolute, in degrees."""
    return write_arm(tmp_path_factory.mktemp("rows") / "arm", generate(Arm(5, unit="deg")))


def check(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([*map(str, arguments), "data.sources.main.val_episodes=[0]"])
    return (code, *capsys.readouterr())


def test_where_nothing_is_declared_the_check_proposes_a_convention_with_which_it_agrees(arm, capsys):
    code, out, err = check(capsys, arm)
    assert (code, err) == (0, "")
    (proposed,) = re.findall(r"to declare: '(.*)'", out)
    assert "{kind:joint,dims:7,unit:deg}" in proposed and "reference:absolute" in proposed
    code, out, _ = check(capsys, arm, proposed)
    assert code == 0
    assert (
        "  agree: unit of observation.state.joint_position[0] to observation.state.joint_position[6] (7) is deg" in out
    )
    assert "  agree: reference of action.joint_position[0] to action.joint_position[6] (7) is absolute" in out
    assert "contradiction" not in out and "to declare" not in out


def test_a_contradiction_is_an_error_whose_remedy_mends_it(arm, capsys):
    wrong = "actions:[{kind:joint,dims:7,unit:rad,reference:delta_step},{kind:gripper}]"
    code, out, err = check(capsys, arm, f"data.sources.main.convention={{{wrong}}}")
    assert code == 2
    assert (
        "  contradiction: unit of action.joint_position[0] to action.joint_position[6] (7) is deg, declared rad" in out
    )
    what, where, remedy = err.splitlines()
    assert what.startswith("error: the data say otherwise: reference of action.joint_position[0]")
    assert what.endswith("is absolute, declared delta_step (and 1 more above)")
    assert where == "  where:  data.sources.main.convention.actions[0].reference"
    assert remedy == "  remedy: set data.sources.main.convention.actions[0].reference: absolute"
    right = wrong.replace("delta_step", "absolute").replace("rad", "deg")
    assert check(capsys, arm, f"data.sources.main.convention={{{right}}}")[0] == 0


def test_no_episode_is_looked_at_where_none_is_asked_for(arm, capsys):
    wrong = "data.sources.main.convention={actions:[{kind:joint,dims:7,unit:rad},{kind:gripper}]}"
    code, out, err = check(capsys, arm, wrong, "--episodes", 0)
    assert (code, err) == (0, "") and "rows of" not in out
    assert check(capsys, arm, wrong, "--episodes", 5)[0] == 2
    assert check(capsys, arm, "--episodes", -1)[0] == 2


def test_two_sources_of_one_robot_are_compared(arm, tmp_path, capsys):
    poses = [write_arm(tmp_path / r, generate(Arm(s, space="pose", rotation=r))) for s, r in ((5, "xyzw"), (6, "wxyz"))]
    both = [f"data.sources.{name}.root={root}" for name, root in zip(("main", "other"), poses)]
    assert main(["+recipe=lerobot", *both]) == 0
    assert re.search(
        r"rows of main and other:\n  note: quaternion order .* is real parts at different ends", capsys.readouterr().out
    )


def test_rows_of_another_rate_than_the_dataset_says_are_a_contradiction(tmp_path, capsys):
    lengths = (60,) * 4
    feature = {"dtype": "float32", "shape": [3], "names": None}
    wave = feature, lambda e, f: np.sin(e + f / 9 + np.arange(3)).tolist()
    cameras = {"observation.images.front": Camera(size=(32, 48))}
    seconds = [np.arange(n) / 33 for n in lengths]
    data = Dataset(lengths, 30, cameras=cameras, seconds=seconds, columns={"action": wave, "observation.state": wave})
    root = write(tmp_path / "fast", data)
    code, _, err = check(capsys, root)
    assert code == 2
    assert "error: the data say otherwise: rate is 33, declared 30" in err
    (remedy,) = re.findall(r"set (data\.sources\.main\.fps=33),", err)
    assert check(capsys, root, remedy)[0] == 0


def test_episodes_with_swapped_cameras_are_named_and_can_be_left_out(tmp_path, capsys):
    rng = np.random.default_rng(0)
    scenes = {"left": (200, 120, 40), "right": (30, 70, 180)}
    pictures = []
    for episode in range(NUM):
        drawn = {
            f"observation.images.{k}": np.uint8(rng.normal(c, 25, (32, 32, 3)).clip(0, 255)) for k, c in scenes.items()
        }
        pictures.append(dict(zip(drawn, reversed(drawn.values()))) if episode == 4 else drawn)
    root = write_arm(tmp_path / "swapped", generate(Arm(5)), pictures)
    code, _, err = check(capsys, root)
    assert code == 2 and "cameras left, right of 4 is swapped" in err
    (remedy,) = re.findall(r"data\.sources\.main\.exclude_episodes=\[4\]", err)
    assert check(capsys, root, remedy)[0] == 0


@pytest.mark.parametrize("root", [DATA / "lerobot_v21", DATA / "lerobot_v30", REAL], ids=lambda p: p.name)
def test_datasets_that_others_wrote_are_contradicted_in_nothing(root, capsys):
    if not root.exists():
        pytest.skip("this data set isn't part of the repository")
    code, out, _ = check(capsys, root)
    assert code == 0 and "contradiction" not in out
