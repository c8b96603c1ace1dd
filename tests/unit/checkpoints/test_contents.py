"""What a checkpoint holds and gives back; saving in the background; failures that leave the last good one."""

import dataclasses
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from opentau_train.checkpoints import commit, contents
from opentau_train.checkpoints.card import Pretrained
from opentau_train.checkpoints.saver import Saver
from opentau_train.config.optimizer import OptimizerSettings, ParameterRule
from opentau_train.config.settings import CheckpointSettings
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.world import launch
from opentau_train.errors import Fault, UserError
from opentau_train.models.average import Ema
from opentau_train.optim import build_optimizer
from opentau_train.step import TrainState
from tests.unit.models.flow_cases import make_batch, make_noise, make_policy

OPTIMIZER = OptimizerSettings(lr=1e-3)
CARD = Pretrained({}, {}, {})


@pytest.fixture
def world():
    with launch(device="cpu", precision="no", timeout=60, identity={}) as world:
        yield world


def make_state(seed: int = 0, ema: bool = True, optimizer: OptimizerSettings = OPTIMIZER, **model) -> TrainState:
    policy = make_policy(seed=seed, **model)
    average = Ema(policy, 0.9) if ema else None
    return TrainState(policy, Replicas(policy, False), build_optimizer(policy, optimizer), average)


def train(state: TrainState, steps: int = 1) -> None:
    for _ in range(steps):
        batch = make_batch(seed=state.step)
        sum(s.sum() for s, _ in state.policy(batch, make_noise(batch, state.step)).values()).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update(state.policy, step=0)
        state.step += 1


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    flat = {}
    for part, values in contents.tensors_of(state).items():
        values = values["state"] if part == "optimizer" else values
        for name, value in values.items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{part}.{name}.{key}": item.clone() for key, item in items}
    return flat


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def save(saver: Saver, state: TrainState, **options) -> Path | None:
    return saver.save(state, stream={"t": state.step}, counters={"bad": 1}, **options)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_loading_gives_back_every_bit_and_training_goes_on_alike(asynchronous, at_once, world, tmp_path):
    state = make_state()
    train(state, 3)
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=asynchronous), CARD) as saver:
        written = save(saver, state, at_once=at_once)
        assert (written is None) == (asynchronous and not at_once)
        path = written or saver.finish()
        before = everything(state)
        other = make_state(seed=7)
        run = contents.load(path, other, world)
        assert run["stream"] == {"t": 3} and run["counters"] == {"bad": 1} and other.step == 3
        assert same(everything(other), before) and len(before) > 100
        train(state), train(other)
        assert same(everything(other), everything(state)) and not same(everything(state), before)


def hold_back(saver: Saver, until: threading.Event) -> None:
    """The thread that writes waits for `until`."""
    write = saver._write

    def wait_and_write(*arguments):
        until.wait()
        write(*arguments)

    saver._write = wait_and_write


def test_what_trains_on_during_a_background_save_is_not_in_it(world, tmp_path):
    """The thread is held back until two more steps are done: the checkpoint is still that of the step it is named."""
    state = make_state()
    train(state, 2)
    before, hold = everything(state), threading.Event()
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=True), CARD) as saver:
        hold_back(saver, hold)
        assert save(saver, state) is None and saver.poll(saver.written) is None
        train(state, 2)
        assert saver.poll(saver.written) is None and commit.complete(tmp_path / "checkpoints") == []
        hold.set()
        path = saver.finish()
        assert saver.finish() is None and saver.poll(saver.written) is None
    other = make_state(seed=7)
    contents.load(path, other, world)
    assert path.name == "00000002" and other.step == 2 and same(everything(other), before)


def test_the_next_save_commits_the_one_before_and_keeps_the_best(world, tmp_path):
    settings = CheckpointSettings(asynchronous=True, keep_last=1, keep_every=4)
    state = make_state()
    with Saver(tmp_path, world, settings, CARD) as saver:
        for _ in range(6):
            train(state)
            save(saver, state)
            if (tmp_path / "checkpoints" / "00000002").exists():
                commit.point(tmp_path / "checkpoints" / "best", "00000002")
        saver.finish()
    assert [int(p.name) for p in commit.complete(tmp_path / "checkpoints")] == [2, 4, 6]


def stamps(path: Path) -> dict[str, int]:
    return {p.relative_to(path).as_posix(): p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_step_that_is_whole_is_not_saved_again_but_for_its_counters(asynchronous, world, tmp_path):
    state = make_state()
    train(state, 2)
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=asynchronous, keep_last=1), CARD) as saver:
        path = save(saver, state) or saver.finish()
        before = stamps(path)
        assert save(saver, state) is None and saver.finish() is None
        assert stamps(path) == before
        assert saver.save(state, stream={"t": 2}, counters={"bad": 7}) is None and saver.finish() is None
        after = stamps(path)
        assert {name for name, stamp in after.items() if before[name] != stamp} == {"run.json", "files.json"}
        other = make_state(seed=7)
        assert contents.load(path, other, world)["counters"] == {"bad": 7} and same(
            everything(other), everything(state)
        )
        (path / "run.json").unlink()  # no longer whole: written anew
        assert (save(saver, state) or saver.finish()) == path and commit.flaw(path) is None


def test_a_write_that_hangs_is_waited_for_no_longer_than_the_limit(world, tmp_path, caplog):
    settings, state = CheckpointSettings(asynchronous=True), make_state()
    with Saver(tmp_path, world, settings, CARD) as saver:
        save(saver, state)
    train(state)
    with Saver(tmp_path, dataclasses.replace(world, timeout=timedelta(seconds=0.2)), settings, CARD) as saver:
        hold_back(saver, threading.Event())
        save(saver, state)
        with pytest.raises(Fault, match=r"(?s)can't save .*00000001: rank 0: .*last good checkpoint is .*00000000"):
            saver.finish()
        save(saver, state)
    assert caplog.text.count("has not answered for 0.2 s") == 2  # the end of the saver, too
    assert commit.newest(tmp_path / "checkpoints").name == "00000000"


def test_an_error_in_training_does_not_give_up_what_was_written(world, tmp_path):
    state = make_state()
    with (
        pytest.raises(ZeroDivisionError),
        Saver(tmp_path, world, CheckpointSettings(asynchronous=True), CARD) as saver,
    ):
        save(saver, state)
        raise ZeroDivisionError
    assert commit.newest(tmp_path / "checkpoints").name == "00000000"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_names_the_last_good_one_and_leaves_no_trace(asynchronous, world, tmp_path):
    state = make_state()
    card = dataclasses.replace(CARD, config={"an object": 1})
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=asynchronous), card) as saver:
        _ = save(saver, state) or saver.finish()
        state.step = 5
        blocked = tmp_path / "checkpoints" / "00000005.tmp" / "pretrained_model"
        with pytest.raises(
            RuntimeError, match=r"(?s)can't save .*00000005: rank 0: .*last good checkpoint is .*00000000"
        ):
            original = saver._content

            def content_and_a_full_disk(*arguments):
                content = original(*arguments)
                blocked.rmdir()
                blocked.write_text("in the way")
                return content

            saver._content = content_and_a_full_disk
            _ = save(saver, state) or saver.finish()
        assert [p.name for p in commit.complete(tmp_path / "checkpoints")] == ["00000000"]
        assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_a_resumed_optimizer_has_the_options_of_now_and_stays_fused(world, tmp_path):
    state = make_state()
    train(state)
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=False), CARD) as saver:
        path = save(saver, state)
    now = OptimizerSettings(lr=5e-4, weight_decay=0.25, options={"betas": [0.5, 0.6]})
    other = make_state(seed=1, optimizer=now)
    contents.load(path, other, world)
    decayed, plain = other.optimizer.param_groups
    assert decayed["weight_decay"] == 0.25 and plain["weight_decay"] == 0.0
    for group in other.optimizer.param_groups:
        assert group["fused"] and group["betas"] == (0.5, 0.6) and group["lr"] == 5e-4
    assert same(everything(other), everything(state))


def test_an_average_may_begin_or_end_at_a_resume(world, tmp_path):
    state = make_state(ema=False)
    train(state)
    with Saver(tmp_path / "none", world, CheckpointSettings(asynchronous=False), CARD) as saver:
        path = save(saver, state)
    begins = make_state(seed=1, ema=True)
    contents.load(path, begins, world)
    assert all(torch.equal(begins.ema.average[n], p) for n, p in state.policy.named_parameters())
    with Saver(tmp_path / "one", world, CheckpointSettings(asynchronous=False), CARD) as saver:
        path = save(saver, begins)
    ends = make_state(seed=2, ema=False)
    contents.load(path, ends, world)
    assert same(everything(ends), everything(state))


def test_another_model_is_named_by_its_shapes(world, tmp_path):
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=False), CARD) as saver:
        path = save(saver, make_state())
    with pytest.raises(UserError, match=r"shape of .*\(32.* there, .*\(64.* here"):
        contents.load(path, make_state(width=64), world)
    with pytest.raises(UserError, match=r"keys missing there: ema\.layers\.2"):
        contents.load(path, make_state(depth=3), world)


@pytest.mark.parametrize("part", ["model", "ema"])
def test_weights_alone_can_be_read_from_the_shards(part, world, tmp_path):
    state = make_state()
    train(state, 2)
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=False), CARD) as saver:
        path = save(saver, state)
    policy = make_policy(seed=9)
    contents.load_weights(path, policy, part)
    expected = state.ema.average if part == "ema" else dict(state.policy.named_parameters())
    assert all(torch.equal(p, expected[n]) for n, p in policy.named_parameters())


def test_groups_may_change_at_a_resume_and_moments_stay_with_their_parameters(world, tmp_path):
    state = make_state()
    train(state)
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=False), CARD) as saver:
        path = save(saver, state)
    rules = {"heads": ParameterRule("*_out.weight", lr_scale=5.0)}
    other = make_state(seed=1, optimizer=OptimizerSettings(lr=1e-3, groups=rules))
    assert len(other.optimizer.param_groups) == 3
    contents.load(path, other, world)
    assert [g["lr_scale"] for g in other.optimizer.param_groups] == [1.0, 5.0, 1.0]
    assert same(everything(other), everything(state))


def test_muon_goes_on_bit_for_bit_and_no_other_optimizer_takes_its_moments(world, tmp_path):
    rules = {"layers": ParameterRule("layers.*", options={"muon": True})}
    muon = OptimizerSettings(lr=1e-3, target="opentau_train.optim.MuonAdamW", groups=rules)
    state, other = make_state(optimizer=muon), make_state(seed=1, optimizer=muon)
    train(state, 2)
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=False), CARD) as saver:
        path = save(saver, state)
    contents.load(path, other, world)
    train(state), train(other)
    assert same(everything(other), everything(state))
    with pytest.raises(UserError, match=r"of another optimizer: it has no (step|exp_avg\w*) of layers\."):
        contents.load(path, make_state(seed=1), world)


def test_an_average_leaves_out_frozen_parameters_and_reads_back_whole(world, tmp_path):
    def make(seed: int) -> TrainState:
        policy = make_policy(seed=seed)
        policy.stem.requires_grad_(False)
        return TrainState(policy, Replicas(policy, False), build_optimizer(policy, OPTIMIZER), Ema(policy, 0.9))

    state, other = make(0), make(1)
    train(state, 2)
    with Saver(tmp_path, world, CheckpointSettings(asynchronous=False), CARD) as saver:
        path = save(saver, state)
    contents.load(path, other, world)
    assert same(everything(other), everything(state)) and "stem.project.weight" not in state.ema.average
    policy = make(2).policy
    contents.load_weights(path, policy, "ema")
    assert torch.equal(policy.stem.project.weight, state.policy.stem.project.weight)
    assert torch.equal(policy.velocity_out.weight, state.ema.average["velocity_out.weight"])
