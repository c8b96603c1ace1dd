"""Validation's promises: a split that holds, groups that don't touch each other, training that doesn't notice."""

import itertools
import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opentau_train.checkpoints import commit
from opentau_train.checkpoints.saver import Saver
from opentau_train.config.modes import MODES
from opentau_train.data.mixture.split import validation_split
from opentau_train.data.order.blocks import draws_per_epoch, make_blocks
from opentau_train.data.order.tape import Tape
from opentau_train.deploy.policy import load_policy
from opentau_train.errors import EXIT_FAULT, UserError
from opentau_train.metrics.sums import Sums, validation_row
from opentau_train.types import EpisodeTable
from opentau_train.validation.passes import Validation
from opentau_train.validation.plan import equal_spans, plan_validation, validation_windows
from tests.modal import MODAL
from tests.nightly import by_day
from tests.program import DATA, TOY, metrics, train_here
from tests.program import run as run_program

# -- the split, over random mixtures -----------------------------------------------------------------------------------

sources = st.lists(
    st.tuples(
        st.lists(st.integers(1, 30), min_size=1, max_size=12),  # episode lengths
        st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0]),  # val_split_ratio
        st.booleans(),  # explicit episodes instead
    ),
    min_size=1,
    max_size=4,
)


def table_of(lengths):
    num = len(lengths)
    return EpisodeTable(np.arange(num) * 3 + 5, np.array(lengths, np.int32), np.zeros(num, np.int16), ("joint",))


def open_sources(found, seed, chunk, drop_tail):
    """[(table, held out, training blocks, validation blocks)], as the mixture makes them."""
    opened = []
    for i, (lengths, ratio, explicit) in enumerate(found):
        table = table_of(lengths)
        chosen = tuple(table.episode_index[::2].tolist()) if explicit else None
        held_out = validation_split(f"d{i}", table.episode_index, ratio, seed, chosen)
        blocks = np.stack([np.arange(len(table)), np.zeros(len(table)), table.length], axis=1).astype(np.int32)
        sides = [
            make_blocks(f"d{i}", table, blocks, keep, rows=chunk, drop_tail=drop_tail, shuffle=True)
            for keep in (~held_out, held_out)
        ]
        opened.append((table, held_out, *sides))
    return opened


@given(sources, st.integers(0, 5), st.integers(1, 8), st.booleans())
@settings(max_examples=max(100, settings.default.max_examples))
def test_no_training_window_shares_an_episode_with_a_validation_one(found, seed, chunk, drop_tail):
    opened = open_sources(found, seed, chunk, drop_tail)
    train, held_out = [o[2] for o in opened], [o[3] for o in opened]
    validated = set(
        zip(*validation_windows(held_out, [np.zeros(len(o[0]), int) for o in opened], None)[:2], strict=True)
    )
    draws = draws_per_epoch([b.num_windows for b in train], [None] * len(train))
    if sum(draws) == 0:
        return
    tape = Tape(train, draws, seed=seed, batch_size=4, lanes_per_sample=2, phase_rows=4)
    seen = tape.windows(np.arange(2 * tape.epoch_size))
    assert not validated & set(zip(seen.dataset.tolist(), seen.episode.tolist(), strict=True))


@given(sources, st.integers(0, 5))
@settings(max_examples=max(60, settings.default.max_examples))
def test_a_share_holds_out_at_least_one_episode_leaves_one_and_all_of_it_is_all(found, seed):
    for (lengths, ratio, explicit), (table, held_out, _, _) in zip(
        found, open_sources(found, seed, 1, False), strict=True
    ):
        if explicit:
            assert table.episode_index[held_out].tolist() == table.episode_index[::2].tolist()
        elif ratio == 1.0:
            assert held_out.all()
        elif ratio > 0 and len(lengths) > 1:
            assert 0 < held_out.sum() < len(lengths)
        else:
            assert not held_out.any()


@given(st.lists(st.integers(1, 20), min_size=2, max_size=12), st.integers(0, 9))
def test_the_split_of_an_episode_depends_on_no_other_episode(lengths, seed):
    numbers = np.arange(len(lengths) + 50)
    whole = validation_split("d", numbers, 0.3, seed)
    fewer = validation_split("d", numbers[::-1][:30], 0.3, seed)[::-1]
    np.testing.assert_array_equal(whole[-30:], fewer)


def test_an_episode_that_is_not_there_can_not_be_held_out():
    with pytest.raises(UserError, match="episode 7 can't be held out"):
        validation_split("d", np.arange(5), 0.1, 0, (1, 7))


@given(st.lists(st.floats(1, 40), max_size=200), st.integers(1, 9))
def test_spans_are_contiguous_cover_all_and_are_even(cost, parts):
    cost = np.array(cost)
    bounds = equal_spans(cost, parts)
    assert bounds[0] == 0 and bounds[-1] == len(cost) and (np.diff(bounds) >= 0).all()
    for low, high in itertools.pairwise(bounds):
        assert abs(cost[low:high].sum() - cost.sum() / parts) <= cost.max(initial=0) + 1e-9


def windows_of(blocks, dataset):
    """(dataset, episode, frame) of every window, in the order of a plan."""
    order = np.lexsort((blocks.start, blocks.number))
    return [
        (dataset, int(blocks.episode[b]), int(frame))
        for b in order
        for frame in blocks.frames(np.full(blocks.length[b], b), np.arange(blocks.length[b]))
    ]


@given(sources, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 15))
def test_workers_together_read_every_window_once_a_mode_and_ahead_only_in_their_own_run(
    found, batch_size, ranks, workers, which
):
    """`which` modes the datasets have, a bit each; the second one has the others, too. One of them isn't asked for."""
    opened = open_sources(found, 0, 1, False)
    has = [[m for i, m in enumerate(MODES) if d == 1 or which & 1 << i] for d in range(len(opened))]
    datasets = [
        SimpleNamespace(
            name=f"d{i}",
            validation=held_out,
            group_of=np.zeros(len(table), int),
            settings=SimpleNamespace(modes=dict.fromkeys(has[i], 1.0)),
            source=SimpleNamespace(episodes=table),
        )
        for i, (table, _, _, held_out) in enumerate(opened)
    ]
    shape = {"batch_size": batch_size, "num_ranks": ranks, "modes": MODES[:3]}
    plan = plan_validation(SimpleNamespace(datasets=datasets), None, **shape)
    seen = []
    for rank, worker in itertools.product(range(ranks), range(workers)):
        batches = list(plan.for_worker(rank, worker, workers))
        rows = [row for b in batches for row in zip(b.dataset, b.episode, b.frame, b.ahead, b.t, strict=True)]
        places = list(dict.fromkeys(row[:3] for row in rows))
        assert all(len(b) == batch_size for b in batches[:-1])
        for dataset, episode, frame, ahead, t in rows:
            place = places.index((dataset, episode, frame))
            going_on = ((dataset, episode, frame + k) == at for k, at in enumerate(places[place + 1 :], start=1))
            assert ahead == sum(itertools.takewhile(bool, going_on))
            seen.append(t)
    assert seen == list(range(len(plan.windows)))
    windows, item = plan.windows, plan.item
    read = list(zip(windows.dataset, windows.episode, windows.frame, windows.mode, strict=True))
    once = [w for d, of in enumerate(opened) for w in windows_of(of[3], d)]
    assert read == [(d, e, f, m) for d, e, f in once for m, mode in enumerate(has[d]) if mode in MODES[:3]]
    assert plan.group_of[item].tolist() == windows.mode.tolist()
    addresses = {(d, e): i for i, (d, e) in enumerate(dict.fromkeys((d, e) for d, e, _, _ in read))}
    assert plan.episode_of.tolist() == sorted(plan.episode_of.tolist())
    whose = dict(zip(addresses.values(), dict.fromkeys(plan.episode_of.tolist()), strict=True))
    assert plan.episode_of[item].tolist() == [whose[addresses[d, e]] for d, e, _, _ in read]


# -- grouping ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_mixed_batches_are_taken_apart_exactly(data):
    """Against one pass a group: any order, any batches, the same bits."""
    num = data.draw(st.integers(1, 60))
    item = np.array(data.draw(st.lists(st.integers(0, 5), min_size=num, max_size=num)))
    rng = np.random.default_rng(num)
    total, count = np.round(rng.normal(size=num) * 2**20) / 2**20, rng.integers(0, 4, num).astype(float)
    cuts = sorted(data.draw(st.lists(st.integers(0, num), max_size=5)))
    sums = Sums(6, ["mse"])
    for part in np.split(rng.permutation(num), cuts):
        sums.add(torch.from_numpy(item[part]), {"mse": (torch.tensor(total[part]), torch.tensor(count[part]))})
    for i in range(6):
        assert sums.values[i, 0].tolist() == [total[item == i].sum(), count[item == i].sum()]


# -- whole runs --------------------------------------------------------------------------------------------------------

RUN = [*TOY, "trainer.steps=4", "validation.every=2", "checkpoint.every=2"]
FROZEN = [*RUN, "trainer.steps=2", "optimizer.lr=1e-30", "optimizer.weight_decay=0"]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A run of FROZEN; who changes one takes a copy."""
    return train_here(FROZEN, tmp_path_factory.mktemp("frozen") / "run")


@pytest.fixture
def resumable(frozen, tmp_path):
    """A copy of it."""
    return shutil.copytree(frozen, tmp_path / "run", symlinks=True)


def validation(row):
    return {tag: value for tag, value in row.items() if tag.startswith("Validation")}


def training(rows):
    return {s: {t: v for t, v in row.items() if t.startswith("Training")} for s, row in rows.items()}


@pytest.mark.slow
def test_a_source_without_actions_leaves_the_robots_mse_unchanged_bit_for_bit(tmp_path):
    """It supervises only the future's pictures; placed before the robots, so it moves every batch and every span."""
    added = [
        f"data.sources.aaa.root={DATA / 'lerobot_v21'}",
        "data.sources.aaa.val_split_ratio=0.6",
        "data.sources.aaa.mode=forward_dynamics",
        "data.sources.aaa.robot_type=speaker",
    ]
    alone = metrics(train_here([*FROZEN, *MODAL], tmp_path / "alone"))[2]
    joined = metrics(train_here([*FROZEN, *MODAL, *added], tmp_path / "joined"))[2]
    mse = {t: v for t, v in validation(alone).items() if "/MSE" in t}
    with_modes = {t.replace("/policy/", "/"): v for t, v in validation(joined).items() if "/MSE" in t}
    assert len(mse) > 8 and mse == with_modes
    assert "Validation/aaa/default/forward_dynamics/VISION_MSE" in joined and "Validation/VISION_MSE" not in alone
    assert "Validation/speaker::default/forward_dynamics/VISION_MSE" in joined


@pytest.mark.slow
def test_permuting_the_config_changes_no_key_and_no_value(frozen, tmp_path):
    sources = [a for a in FROZEN if a.startswith("data.sources.")]
    others = [a for a in FROZEN if not a.startswith(("data.sources.", "+recipe"))]
    permuted = ["+recipe=lerobot", *others, *reversed(sources)]
    assert permuted != FROZEN and sorted(permuted) == sorted(FROZEN)
    assert metrics(train_here(permuted, tmp_path / "permuted")) == metrics(frozen)


@pytest.mark.slow
def test_validating_more_often_changes_no_training_number(tmp_path):
    """With everything that a pass can do, and dropout in the data."""
    run = [*TOY, "trainer.steps=3", "data.dropout.prompt=0.5", "trainer.ema_decay=0.9", "data.num_workers=1"]
    run.append("validation.max_samples_per_group=4")
    more = ["validation.evaluators=[loss,action]", "validation.num_noise_draws=2"]
    never = metrics(train_here([*run, "validation.every=0"], tmp_path / "never"))
    often = metrics(train_here([*run, *more, "validation.every=1"], tmp_path / "often"))
    assert training(never) == training(often) and len(never) == 3


@pytest.mark.slow
def test_ambient_random_states_and_modes_are_untouched_by_a_pass(tmp_path, monkeypatch):
    import random

    states = []
    run = Validation.run

    def watched(validation, policy, *arguments):
        def now():
            _, numpy_state, *rest = np.random.get_state()
            weights = {n: p.detach().clone() for n, p in policy.named_parameters()}
            return torch.get_rng_state(), numpy_state, rest, random.getstate(), policy.training, weights

        before = now()
        measured = run(validation, policy, *arguments)
        states.append((before, now()))
        return measured

    monkeypatch.setattr(Validation, "run", watched)
    train_here(
        [*RUN, "trainer.ema_decay=0.5", "validation.evaluators=[loss,action]", "data.num_workers=1"], tmp_path / "run"
    )
    assert len(states) == 2
    for before, after in states:
        assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2:5] == after[2:5]
        assert all(torch.equal(v, after[5][n]) for n, v in before[5].items())


@pytest.mark.slow
def test_frozen_weights_give_the_same_bits_again_and_after_a_restart(resumable, tmp_path):
    longer = [*FROZEN, "trainer.steps=4"]
    rows = metrics(train_here(longer, tmp_path / "whole"))
    assert validation(rows[2]) == validation(rows[4])
    again = metrics(train_here([*longer, "resume=auto"], resumable))
    assert validation(again[4]) == validation(rows[4])


@pytest.mark.slow
def test_more_noise_draws_change_the_mse_and_nothing_else(frozen, tmp_path):
    one = metrics(frozen)[2]
    four = metrics(train_here([*FROZEN, "validation.num_noise_draws=4"], tmp_path / "four"))[2]
    assert one["Validation/MSE"] != four["Validation/MSE"]
    assert one["Validation/MSE"] == pytest.approx(four["Validation/MSE"], rel=0.3)
    assert one["Validation/CE"] == four["Validation/CE"]
    assert one["Validation/main/default/MSE/N"] == four["Validation/main/default/MSE/N"]


@pytest.mark.slow
def test_a_source_for_validation_only_is_seen_in_no_batch_and_moves_no_aggregate(frozen, tmp_path):
    only = [
        f"data.sources.zoo.root={DATA / 'lerobot_v21'}",
        "data.sources.zoo.val_split_ratio=1.0",
        "data.sources.zoo.robot_type=toy6",
    ]
    alone = metrics(frozen)
    joined = metrics(train_here([*FROZEN, *only], tmp_path / "joined"))
    assert joined[2]["Validation/zoo/default/MSE/N"] == 93
    assert all(np.isfinite(value) for row in joined.values() for value in row.values())
    for tag in ("Validation/MSE", "Validation/CE", "Validation/Loss", "Validation/main/default/MSE"):
        assert joined[2][tag] == alone[2][tag]
    assert not any("/zoo/" in tag for row in joined.values() for tag in row if tag.startswith("Training"))
    with pytest.raises(UserError, match="for validation only"):
        train_here([*FROZEN, *only, "data.sources.zoo.weight=1.0"], tmp_path / "weighted")


def test_a_mixture_for_validation_only_can_not_be_trained_on(tmp_path):
    nothing = [f"data.sources.{n}.val_split_ratio=1.0" for n in ("main", "old")]
    with pytest.raises(UserError, match="no training window"):
        train_here([*FROZEN, *nothing], tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("data.sources.main.val_episodes=[0,3]", "no longer held out: 1; newly held out: 3"),
        ("data.sources.old.val_split_ratio=0", "no longer held out: 0"),
    ],
)
def test_resuming_on_another_split_is_an_error_that_names_the_episodes(change, named, resumable):
    with pytest.raises(UserError, match=named):
        train_here([*FROZEN, "trainer.steps=3", "resume=auto", change], resumable)


@pytest.mark.slow
def test_training_keeps_the_best_checkpoint_by_paired_differences_also_when_resumed(tmp_path):
    run = [*TOY, "trainer.steps=12", "validation.every=3", "checkpoint.every=2", "checkpoint.keep_last=1"]
    run += ["validation.best_margin=0.5", "validation.max_samples_per_group=16"]
    whole = train_here(run, tmp_path / "whole")
    best = (whole / "checkpoints" / "best").resolve()
    assert (best / "run.json").is_file() and int(best.name) % 3 == 0
    losses = {s: row["Validation/Loss"] for s, row in metrics(whole).items() if "Validation/Loss" in row}
    assert losses[int(best.name)] < losses[3]
    lowest = (whole / "checkpoints" / "lowest").resolve()
    assert losses[int(lowest.name)] == min(losses.values())

    class Stop(Exception):
        """Ends the first half as a kill would."""

    from opentau_train import loop

    take = loop.train_step

    def until_seven(state, *arguments, **options):
        if state.step == 7:
            raise Stop
        return take(state, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "train_step", until_seven)
        train_here(run, tmp_path / "halves")
    resumed = train_here([*run, "resume=auto"], tmp_path / "halves")
    names = [(resumed / "checkpoints" / link).resolve().name for link in ("best", "lowest")]
    assert names == [best.name, lowest.name]
    assert metrics(resumed) == metrics(whole)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_frozen_weights_never_move_the_best_and_pruning_never_takes_it(asynchronous, tmp_path, monkeypatch):
    """Saved in the background too, where each save begins before the one before is whole."""
    write = Saver._write

    def slowly(*arguments):
        time.sleep(0.2)
        write(*arguments)

    monkeypatch.setattr(Saver, "_write", slowly)
    frozen = [*FROZEN, "trainer.steps=6", "checkpoint.every=1", "checkpoint.keep_last=1"]
    frozen += [f"checkpoint.async={asynchronous}", "validation.max_samples_per_group=8"]
    run = train_here(frozen, tmp_path / "run")
    folder = run / "checkpoints"
    assert (folder / "best").resolve().name == "00000002" and (folder / "last").resolve().name == "00000006"
    assert sorted(p.name for p in folder.iterdir()) == ["00000002", "00000006", "best", "last", "lowest"]


def test_without_a_margin_no_checkpoint_is_the_best(tmp_path):
    off = train_here([*FROZEN, "validation.best_margin=null", "validation.max_samples_per_group=8"], tmp_path / "off")
    lowest = off / "checkpoints" / "lowest"
    assert lowest.exists() and not (off / "checkpoints" / "best").is_symlink()
    assert load_policy(lowest).robots
    again = train_here([*FROZEN, "trainer.steps=3", "validation.every=0", f"resume={lowest}"], tmp_path / "on")
    assert min(metrics(again)) == int(lowest.resolve().name) + 1


# -- windows that can't be read ----------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """The toy mixture with the video of a held-out episode cut short."""
    root = tmp_path / "damaged"
    shutil.copytree(DATA / "lerobot_v21", root)
    (video,) = root.rglob("episode_000001.mp4")
    video.chmod(0o644)
    video.write_bytes(video.read_bytes()[:200])
    return [*FROZEN, f"data.sources.old.root={root}", "data.sources.old.val_episodes=[0,1]"]


def test_a_corrupt_validation_window_fails_the_pass_with_its_name(damaged, tmp_path):
    with pytest.raises(UserError, match="a validation window can't be read") as error:
        train_here(damaged, tmp_path / "run")
    assert error.value.where == "dataset 'old', episode 1, frame 0" and "on_bad_sample=skip" in error.value.remedy


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [["checkpoint.every=2", "checkpoint.async=false"], ["checkpoint.every=2"], ["checkpoint.every=0"]],
    ids=["both_due", "both_due_async", "no_save_due"],
)
def test_a_failed_validation_loses_no_step(settings, damaged, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [*damaged, *settings, "trainer.steps=3"]
    with pytest.raises(UserError, match="a validation window can't be read"):
        train_here(arguments, run_dir)
    saved = json.loads((run_dir / "checkpoints/00000002/run.json").read_text())
    assert saved["step"] == 2 and saved["counters"]["validated"] == 0
    train_here([*arguments, "validation.on_bad_sample=skip", "resume=auto"], run_dir)
    rows = metrics(run_dir)
    assert sorted(rows) == [1, 2, 3] and "Validation/Loss" in rows[2]
    last = run_dir / "checkpoints/00000003"
    assert commit.flaw(last) is None
    assert json.loads((last / "run.json").read_text())["counters"]["validated"] == 3


@pytest.mark.distributed
@pytest.mark.parametrize("every", by_day([2, 0], 2))
def test_a_validation_that_fails_on_one_rank_loses_no_step(every, tmp_path):
    arguments = [*FROZEN, "trainer.steps=4", "validation.every=2", f"checkpoint.every={every}"]
    arguments += ["model._target_=tests.misbehaving.BrokenValidation", f"paths.run_dir={tmp_path / 'run'}"]
    ended = run_program(arguments, 2, BROKEN_RANK="1")
    assert ended.returncode == EXIT_FAULT and "ZeroDivisionError: division by a broken part" in ended.stderr
    assert [p.name for p in commit.complete(tmp_path / "run/checkpoints")] == ["00000002"], ended.stderr
    again = run_program([*arguments, "resume=auto"], 2)
    assert again.returncode == 0 and "resumed from" in again.stderr, again.stderr
    assert sorted(metrics(tmp_path / "run")) == [1, 2, 3, 4]


def test_skip_leaves_corrupt_windows_out_counts_and_names_them(damaged, tmp_path):
    run = train_here([*damaged, "validation.on_bad_sample=skip"], tmp_path / "run")
    row = metrics(run)[2]
    lengths = [json.loads(x)["length"] for x in (DATA / "lerobot_v21/meta/episodes.jsonl").read_text().splitlines()]
    assert row["Validation-LeftOut/Windows"] == lengths[1]
    assert row["Validation/old/default/MSE/N"] == lengths[0]
    assert "Validation/old/default/MSE/StdErr" not in row  # one readable episode is left
    assert f"left out {lengths[1]} windows" in (run / "train.log").read_text()
    assert "dataset old, episode 1, frame 0" in (run / "train.log").read_text()


# -- conservation ------------------------------------------------------------------------------------------------------


def test_lost_windows_and_miscounted_elements_end_the_pass_with_the_groups_name():
    from opentau_train.types import Group
    from opentau_train.validation.losses import check_conservation

    plan = SimpleNamespace(
        num_windows=np.array([3, 2]),
        group_of=np.array([0, 1]),
        episodes=(("a", 7), ("b", 9)),
        mixture=SimpleNamespace(groups=(Group("a", "joint", "r", 1.0), Group("b", "ee", "r", 1.0))),
    )
    values = np.ones((2, 1, 2))
    check_conservation(plan, values, np.ones((2, 1)), np.array([3.0, 2.0]), ())
    with pytest.raises(RuntimeError, match="1 windows in b/ee, 2 were planned; first in episode 9"):
        check_conservation(plan, values, np.ones((2, 1)), np.array([3.0, 1.0]), ())
    with pytest.raises(RuntimeError, match="1 loss elements in a/joint, 2 were planned"):
        check_conservation(plan, values, np.array([[2.0], [1.0]]), np.array([3.0, 2.0]), ())


def test_a_term_without_supervision_is_absent_and_zero_loss_is_not():
    from opentau_train.types import Group

    groups = [Group("a", "joint", "r::joint", 1.0), Group("b", "joint", "r::joint", 1.0)]
    episodes = np.zeros((2, 2, 2))
    episodes[0, 0], episodes[1, 1] = [0.0, 4.0], [2.0, 4.0]
    row = validation_row(episodes, np.array([0, 1]), np.ones(2), groups, ["mse", "ce"], {"mse": 1.0, "ce": 1.0})
    assert row["Validation/a/joint/MSE"] == 0.0 and "Validation/a/joint/CE" not in row
    assert row["Validation/r::joint/MSE/N"] == 1.0 and row["Validation/MSE"] == 0.0 and row["Validation/CE"] == 0.5
