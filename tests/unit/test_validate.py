"""The pieces of a validation that need no training: means, pairs, splits, units, pictures, what is refused."""

import json
import logging
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opentau_train import cli, validate
from opentau_train.checkpoints.best import FEW_EPISODES, Ranking
from opentau_train.checkpoints.commit import seal
from opentau_train.data.mixture.split import numbers, ranges
from opentau_train.errors import EXIT_USER, UserError
from opentau_train.metrics.sums import exact, group_means, paired_difference
from opentau_train.models.average import Ema
from opentau_train.types import Group
from opentau_train.validation.actions import unit_of
from opentau_train.validation.changes import changes
from opentau_train.validation.evaluator import Compared, Scores
from opentau_train.validation.plots import Panel, as_json, draw_panels
from tests.program import DATA, TOY, metrics, train_here

GROUPS = [Group("a", "joint", "r::joint", 3.0), Group("b", "ee", "r::ee", 1.0), Group("c", "ee", "r::ee", 0.0)]


@given(st.lists(st.integers(0, 500)))
def test_ranges_tell_every_number(found):
    assert numbers(ranges(found)) == set(found)


def test_ranges_are_short_for_runs():
    assert ranges([19, 3, 17, 18]) == "3, 17-19" and ranges([]) == ""


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), st.randoms())
def test_exact_sums_do_not_depend_on_their_order(values, random):
    def total(found):
        sums, _ = exact({"mse": (torch.tensor(found, dtype=torch.float32), torch.ones(len(found)))})["mse"]
        return sum(sums.tolist())

    shuffled = random.sample(values, len(values))
    assert total(values) == total(shuffled)
    assert total(values) == pytest.approx(sum(values), abs=len(values) * 2.0**-24)


def test_exact_keeps_what_is_not_finite():
    sums, _ = exact({"mse": (torch.tensor([float("nan"), float("inf")]), torch.ones(2))})["mse"]
    assert sums[0].isnan() and sums[1] == float("inf")


def test_group_means_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    group_of = rng.integers(0, 3, 40)
    episodes = np.stack([rng.normal(size=(40, 2)), rng.integers(0, 9, (40, 2))], axis=-1)
    means = group_means(episodes, group_of, np.full(40, 2.0), 4)
    for g in range(3):
        for k in range(2):
            mine = episodes[(group_of == g) & (episodes[:, k, 1] > 0), k]
            assert means.mean[g, k] == pytest.approx(episodes[group_of == g, k, 0].sum() / mine[:, 1].sum())
            residual = mine[:, 0] - means.mean[g, k] * mine[:, 1]
            error = np.sqrt(len(mine) / (len(mine) - 1) * (residual**2).sum()) / mine[:, 1].sum()
            assert means.error[g, k] == pytest.approx(error)
            assert means.windows[g, k] == 2 * len(mine)
    assert means.count[3].tolist() == [0, 0] and np.isnan(means.mean[3]).all() and np.isnan(means.error[3]).all()


# -- best ------------------------------------------------------------------------------------------------------------


def sums_of(means: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.stack([means * counts, counts], axis=-1)[:, None]


def difference(new, old, counts, group_of, groups):
    """Of one term, in rows of one episode each."""
    return paired_difference(
        sums_of(new, counts), sums_of(old, counts), group_of, groups, [1.0], np.arange(len(group_of))
    )


def test_rows_of_an_episode_in_several_modes_are_one_in_the_error():
    """The same change in both modes says nothing that it doesn't say in one."""
    rng = np.random.default_rng(5)
    old, change, counts = rng.normal(5, 3, 10), rng.normal(-0.1, 0.05, 10), np.full(10, 8.0)
    one = difference(old + change, old, counts, np.zeros(10, int), GROUPS[:1])
    new, same, twice = np.repeat(old + change, 2), np.repeat(old, 2), np.full(20, 8.0)
    modes, episode_of = np.tile([0, 1], 10), np.repeat(np.arange(10), 2)
    both = paired_difference(sums_of(new, twice), sums_of(same, twice), modes, GROUPS[:2], [1.0], episode_of)
    assert both == pytest.approx(one)


def test_paired_difference_of_one_group_is_the_paired_t_tests():
    rng = np.random.default_rng(1)
    old, change = rng.normal(5, 3, 12), rng.normal(-0.1, 0.05, 12)
    counts, group_of = np.full(12, 8.0), np.zeros(12, int)
    delta, error = difference(old + change, old, counts, group_of, GROUPS[:1])
    assert delta == pytest.approx(change.mean())
    assert error == pytest.approx(change.std(ddof=1) / np.sqrt(12))


def test_paired_difference_is_the_difference_of_the_aggregates_and_its_error_is_right():
    """Against repeated draws of the episodes' changes: the error is the spread of the differences."""
    rng = np.random.default_rng(2)
    group_of = np.repeat([0, 1], [20, 10])
    counts, old = rng.integers(4, 20, 30).astype(float), rng.normal(5, 3, 30)
    found = []
    for _ in range(400):
        new = old + rng.normal(-0.2, 0.3, 30)
        found.append(difference(new, old, counts, group_of, GROUPS[:2]))
        means = [np.average(v[group_of == g], weights=counts[group_of == g]) for v in (new, old) for g in (0, 1)]
        assert found[-1][0] == pytest.approx(0.75 * (means[0] - means[2]) + 0.25 * (means[1] - means[3]))
    deltas, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(deltas.std(), rel=0.15)


def test_noise_alone_rarely_beats_two_standard_errors_and_a_real_gain_does():
    rng = np.random.default_rng(3)
    counts, group_of, old = np.full(30, 5.0), np.repeat([0, 1], 15), rng.normal(5, 3, 30)

    def beats(gain):
        new = old + rng.normal(-gain, 0.3, 30)
        delta, error = difference(new, old, counts, group_of, GROUPS[:2])
        return -delta > 2 * error

    assert np.mean([beats(0.0) for _ in range(300)]) < 0.06
    assert np.mean([beats(0.5) for _ in range(100)]) > 0.95


def test_groups_of_one_episode_make_the_noise_larger_never_zero():
    counts, old = np.full(2, 5.0), np.array([3.0, 4.0])
    new = old - np.array([1.0, 0.1])
    _, error = difference(new, old, counts, np.array([0, 1]), GROUPS[:2])
    assert error > 0
    three = np.array([3.0, 3.5, 4.0])
    changed = three - np.array([0.1, 0.1, 1.0])
    _, error = difference(changed, three, np.full(3, 5.0), np.array([0, 0, 1]), GROUPS[:2])
    assert error == pytest.approx(0.25)  # the lone group's whole change, at its share


def ranking_of(tmp_path, num_episodes=6, margin=2.0):
    names, each = tuple(f"a/{n}" for n in range(num_episodes)), np.arange(num_episodes)
    compared = Compared(names, np.zeros(num_episodes, int), tuple(GROUPS[:1]), (1.0,), each, ("mse",))
    return Ranking(tmp_path, compared, margin)


def scores_of(means, counts=8.0):
    counts = np.broadcast_to(np.asarray(counts, float), means.shape)
    return Scores(float(means.mean()), sums_of(means, counts))


def saved(tmp_path, step):
    (tmp_path / "checkpoints" / f"{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / f"{step:08d}" / "run.json").write_text("{}")


def links(tmp_path):
    return {p.name: int(os.readlink(p)) for p in (tmp_path / "checkpoints").iterdir() if p.is_symlink()}


WORLD = SimpleNamespace(is_main=True, broadcast=lambda value: value, agree=lambda work: work())


def test_the_best_moves_for_more_than_noise_the_lowest_always_and_a_resume_takes_up_the_record_of_its_step(tmp_path):
    rng = np.random.default_rng(0)
    start = rng.normal(5, 3, 6)
    ranking = ranking_of(tmp_path)
    assert ranking.update(WORLD, 10, scores_of(start)) == {"best", "lowest"}
    other = np.array([0.3, 0.2, 0.1, -0.2, 0.1, 0.0])
    assert ranking.update(WORLD, 20, scores_of(start + other)) == set()
    assert ranking.update(WORLD, 22, scores_of(start - other)) == {"lowest"}
    assert ranking.update(WORLD, 25, scores_of(np.full(6, np.nan))) == set()
    assert ranking.steps == {10, 22}
    for step in (10, 22):
        saved(tmp_path, step)
    ranking.point()
    assert links(tmp_path) == {"best": 10, "lowest": 22}
    assert ranking.update(WORLD, 30, scores_of(start - 0.5 + rng.normal(0, 0.05, 6))) == {"best", "lowest"}
    ranking.point()
    assert links(tmp_path) == {"best": 10, "lowest": 22}, "a link never names a checkpoint that isn't whole"
    saved(tmp_path, 30)
    ranking.point()
    assert links(tmp_path) == {"best": 30, "lowest": 30}

    later, earlier = ranking_of(tmp_path), ranking_of(tmp_path)
    later.restore(WORLD, 35)
    assert later.steps == {30} and later.update(WORLD, 40, scores_of(start - 0.45)) == set()
    earlier.restore(WORLD, 29)  # step 30 is still to come: what it left is forgotten
    assert earlier.steps == {10, 22} and links(tmp_path) == {"best": 10, "lowest": 22}
    assert earlier.update(WORLD, 30, scores_of(start - 0.5)) == {"best", "lowest"}


def test_other_windows_start_the_comparison_anew_and_left_out_ones_are_left_out_of_it(tmp_path):
    start = np.linspace(1, 6, 6)
    ranking = ranking_of(tmp_path)
    ranking.update(WORLD, 10, scores_of(start))
    fewer = np.array([8.0, 8.0, 8.0, 8.0, 8.0, 2.0])  # the hardest episode couldn't be read
    assert "best" not in ranking.update(WORLD, 20, scores_of(start * np.array([1, 1, 1, 1, 1, 0]), fewer))
    assert "best" in ranking.update(WORLD, 30, scores_of(start - np.linspace(0.9, 1.1, 6), fewer))
    other = ranking_of(tmp_path, 5)
    other.restore(WORLD, 30)
    assert other.last is None and not other.steps


def test_without_a_margin_or_with_one_episode_there_is_a_lowest_pass_and_no_best_one(tmp_path):
    assert ranking_of(tmp_path, margin=None).update(WORLD, 10, scores_of(np.ones(6))) == {"lowest"}
    assert ranking_of(tmp_path / "one", 1).update(WORLD, 10, scores_of(np.ones(1))) == {"lowest"}


def test_too_few_episodes_to_tell_checkpoints_apart_are_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("opentau_train"), "propagate", True)
    ranking_of(tmp_path, FEW_EPISODES)
    assert not caplog.records
    ranking_of(tmp_path, FEW_EPISODES - 1)
    assert "9 validation episodes can't tell checkpoints apart" in caplog.text and "val_split_ratio" in caplog.text


def test_changes_since_the_last_pass_are_paired_also_after_a_resume(tmp_path):
    rng = np.random.default_rng(1)
    start, change = rng.normal(5, 3, 6), rng.normal(-0.2, 0.1, 6)
    ranking = ranking_of(tmp_path)
    ranking.update(WORLD, 10, scores_of(start))
    resumed = ranking_of(tmp_path)
    resumed.restore(WORLD, 15)
    told = changes(resumed.compared, scores_of(start + change).sums, resumed.last.sums)
    tag, error = f"Validation/{GROUPS[0].tag}/MSE", change.std(ddof=1) / np.sqrt(6)
    for name in (tag, "Validation/Loss", "Validation/MSE"):
        assert told[name] == pytest.approx(change.mean()) and told[f"{name}/StdErr"] == pytest.approx(error)


# -- units, pictures, averages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("action.joint_position[3]", "rad"),
        ("action.joint_velocity[3]", "rad_s"),
        ("action.gripper_position[0]", "gripper"),
        ("action.cartesian_position[2]", "m"),
        ("action.cartesian_position[4]", "rad"),
        ("action.cartesian_velocity[0]", "m_s"),
        ("action.x", "m"),
        ("action.delta_y", "m"),
        ("action.roll", "rad"),
        ("action.left_joint_2", "rad"),
        ("action[3]", ""),
        ("action.motor_a", ""),
    ],
)
def test_units_come_from_names_only_where_they_tell(name, unit):
    assert unit_of(name) == unit


def test_the_picture_shows_both_curves_also_with_nan():
    panel = Panel("a/joint episode 3", "joint [rad]", np.linspace(0, 1, 8), np.append(np.zeros(7), np.nan))
    picture = draw_panels([[panel, panel], [panel]])
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    colours = {tuple(c) for c in picture.reshape(-1, 3)}
    assert {(30, 30, 30), (220, 60, 40)} <= colours
    np.testing.assert_array_equal(picture, draw_panels([[panel, panel], [panel]]))


def test_the_numbers_of_a_picture_are_plain_json_also_with_nan():
    panel = Panel("a/joint episode 3", "joint [rad]", np.array([0.0, 0.5]), np.array([1.0, np.nan, 2.0]))
    made = json.loads(as_json([[panel], [panel]]), parse_constant=pytest.fail)
    assert made == 2 * [
        {"place": "a/joint episode 3", "name": "joint [rad]", "true": [0.0, 0.5], "predicted": [1.0, None, 2.0]}
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_applied_and_taken_back_bit_for_bit(dtype):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(dtype)
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1 / 3)
    ema.update(model, step=0)
    own = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(KeyError), ema.applied_to(model):
        assert torch.equal(model.weight, ema.average["weight"].to(dtype))
        assert not torch.equal(model.weight, own["weight"])
        raise KeyError
    assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    overrides = [
        "trainer.steps=4",
        "validation.every=2",
        "trainer.ema_decay=0.9",
        "validation.evaluators=[loss,action]",
    ]
    return train_here([*TOY, *overrides], tmp_path_factory.mktemp("trained") / "run")


def command(trained, *arguments):
    validate.run([f"checkpoint={trained}", f"paths.cache_dir={trained.parent / 'cache'}", *arguments])


@pytest.mark.slow
def test_command_equals_what_training_logged_bit_for_bit(trained, tmp_path):
    command(trained, f"out={tmp_path / 'v.json'}")
    result = json.loads((tmp_path / "v.json").read_text())
    logged = {k: v for k, v in metrics(trained)[4].items() if k.startswith("Validation")}
    assert result["metrics"] == logged and len(logged) > 50
    assert result["step"] == 4 and result["left_out"] == [] and result["trained_on"] == {}
    assert (tmp_path / "v_actions.png").is_file() and (trained / "plots" / "actions_00000004.png").is_file()


@pytest.mark.slow
def test_command_validates_another_mixture_and_names_episodes_that_were_trained_on(trained):
    command(
        trained,
        "+data=lerobot",
        f"data.sources.main.root={DATA / 'lerobot_v30'}",
        "data.sources.main.val_split_ratio=1.0",
    )
    result = json.loads((trained / "checkpoints" / "last" / "validation.json").read_text())
    assert result["windows"] > 67 and numbers(result["trained_on"]["main"])
    assert any(tag.startswith("Validation/main/") for tag in result["metrics"])
    assert not any(tag.startswith("Validation/old/") for tag in result["metrics"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.width=64"], "model.width is the run's"),
        (["data.normalization=min_max"], "normalises by mean_std, this validation by min_max"),
        (["data.image_size=[48,48]"], "image_size"),
        (["data.chunk_length=40"], "chunk_length 16, the data 40"),
        (["data.sources.main.robot_type=other"], "no statistics for norm head other::default"),
        (["data.sources.main.val_split_ratio=0", "data.sources.old.val_split_ratio=0"], "holds nothing out"),
        (["data.future.num_frames=2"], "has future.num_frames 0, the data 2"),
        (["data.future.num_frames=2", "data.sources.main.mode=wam"], "FlowPolicy has no mode 'wam'"),
        (["validation.metric=[action]"], "unknown key 'validation.metric'"),
    ],
)
def test_another_convention_is_refused_with_the_difference(trained, arguments, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        command(trained, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["stats", "policy"])
def test_a_checkpoint_without_statistics_or_convention_is_refused(trained, part, tmp_path):
    copy = tmp_path / "00000004"
    shutil.copytree(trained / "checkpoints" / "00000004", copy)
    (copy / "pretrained_model" / f"{part}.json").unlink()
    seal(copy)  # whole by its manifest, as another program may have made it
    with pytest.raises(UserError, match="the checkpoint has no readable"):
        command(copy)


def test_an_average_that_the_checkpoint_does_not_hold_is_refused(tmp_path):
    run = train_here([*TOY, "trainer.steps=1", "validation.every=0"], tmp_path / "run")
    with pytest.raises(UserError, match="holds no average of the weights"):
        command(run, "trainer.ema_decay=0.9")


@pytest.mark.slow
def test_other_names_of_the_same_dimensions_are_refused(trained, tmp_path):
    copy = tmp_path / "00000004"
    shutil.copytree(trained / "checkpoints" / "00000004", copy)
    path = copy / "pretrained_model" / "policy.json"
    card = json.loads(path.read_text())
    names = card["norm_heads"]["toy::default"]
    card["norm_heads"]["toy::default"], card["action_names"]["main"] = [*names[:-1], "action.gripper"], []
    path.write_text(json.dumps(card))
    seal(copy)
    with pytest.raises(UserError, match=r"has 'action.gripper' as action dimension 6 of toy::default"):
        command(copy)


def test_mistakes_on_the_command_line_end_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["validate"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    assert cli.answer(lambda: validate.run([])) == EXIT_USER
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    assert cli.answer(lambda: validate.run(["checkpoint=/nowhere"])) == EXIT_USER
    said = capsys.readouterr().err
    assert "checkpoint=RUN" in said and "Traceback" not in said
