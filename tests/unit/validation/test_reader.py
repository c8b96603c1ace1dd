"""The workers of a validation live from its first pass to its end, whatever each pass reads, and no number tells."""

import multiprocessing
import os
import signal

import pytest
import torch

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.config.typed import instantiate
from opentau_train.data.mixture.open import open_mixture
from opentau_train.distributed.parallel import spread
from opentau_train.distributed.stopping import StopFlag, Stopped
from opentau_train.distributed.world import World, launch
from opentau_train.errors import Fault
from opentau_train.models.average import Ema
from opentau_train.validation.passes import Validation, open_evaluators
from tests.fake_source import with_data
from tests.program import TOY, metrics, train_here

EVERYTHING = ["validation.evaluators=[loss,action]", "validation.max_samples_per_group=13", "validation.batch_size=4"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(settings, mixture, world, (policy, replicas, average))."""
    cache = tmp_path_factory.mktemp("opened") / "cache"
    settings = load_settings(cli.compose([*TOY, *EVERYTHING, f"paths.cache_dir={cache}"]))
    with launch(device="cpu", precision="no", timeout=60, identity={}) as world:
        mixture = open_mixture(settings)
        torch.manual_seed(0)
        policy = instantiate(settings.model, "model", spec=mixture.spec)
        mixture = mixture.for_policy(policy.wants())
        yield settings, mixture, world, (policy, spread(policy, policy.blocks(), world, None), Ema(policy, 0.5))


@pytest.fixture
def validation(opened):
    """A validation with `num_workers` workers; what it leaves running ends with the test."""
    settings, mixture, world, _ = opened
    made = []

    def validation_of(num_workers: int) -> Validation:
        evaluators = open_evaluators(settings.validation)
        made.append(Validation(with_data(mixture, num_workers=num_workers), settings.validation, evaluators, world, 4))
        return made[-1]

    yield validation_of
    for one in made:
        one.close()


def workers() -> set[int]:
    return {process.pid for process in multiprocessing.active_children()}


def same(left, right):
    assert left.row == right.row and len(left.row) > 60
    assert (left.scores.sums == right.scores.sums).all()
    assert all((a.pixels == b.pixels).all() for a, b in zip(left.pictures, right.pictures, strict=True))


@pytest.mark.slow
def test_all_passes_have_the_same_workers_and_the_numbers_that_none_gives(opened, validation):
    """Losses, the average's losses and actions, each pass with a plan of its own; then all of it again."""
    *_, trained = opened
    before = workers()
    alone, shared = validation(0), validation(2)
    assert workers() == before, "none starts before there is something to read"
    first = shared.run(*trained)
    pids = workers() - before
    assert len(pids) == 2
    again = shared.run(*trained)
    assert workers() - before == pids
    same(first, again)
    same(first, alone.run(*trained))
    same(first, alone.run(*trained))
    assert workers() - before == pids, "a validation without workers starts none"
    shared.close()
    assert workers() == before


@pytest.mark.distributed
def test_a_worker_killed_between_two_passes_is_named(opened, validation):
    *_, trained = opened
    before, killed = workers(), validation(2)
    killed.run(*trained)
    pid = min(workers() - before)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Fault, match=rf"a data worker on .* died \(pid {pid}, killed by SIGKILL\)") as fault:
        killed.run(*trained)
    assert "data.num_workers" in fault.value.remedy
    killed.close()
    assert workers() == before


@pytest.mark.distributed
def test_a_run_whose_validation_worker_is_killed_trains_on_and_ends_with_its_name_at_the_next_pass(
    tmp_path, monkeypatch
):
    before, run, killed = workers(), Validation.run, []

    def then_kill(validation, *arguments):
        others = workers()
        measured = run(validation, *arguments)
        killed.extend(workers() - others)
        os.kill(killed[0], signal.SIGKILL)
        return measured

    monkeypatch.setattr(Validation, "run", then_kill)
    overrides = ["trainer.steps=4", "validation.every=2", "data.num_workers=1", "checkpoint.every=0"]
    with pytest.raises(Fault, match=r"a data worker on .* died \(pid \d+, killed by SIGKILL\)"):
        train_here([*TOY, *overrides], tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert len(killed) == 1 and "Training/Loss" in rows[4] and "Validation/Loss" in rows[2]
    assert "Validation/Loss" not in rows[4] and workers() == before


@pytest.mark.slow
def test_a_pass_that_was_left_ends_its_workers_and_the_next_one_reads_all(opened, validation):
    *_, trained = opened
    before, left = workers(), validation(2)
    whole = left.run(*trained)
    with pytest.raises(Stopped):
        left.run(*trained, StopFlag(code=1))
    assert workers() == before
    same(whole, left.run(*trained))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_after_one_that_an_error_ended_reads_its_own_windows(num_workers, opened, validation):
    *_, (policy, *others) = opened
    broken = validation(num_workers)
    whole = broken.run(policy, *others)

    class Broken(Exception):
        """Ends the pass in the middle, as a lack of memory may."""

    def fail(*_):
        raise Broken

    hook = policy.register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        broken.run(policy, *others)
    hook.remove()
    same(whole, broken.run(policy, *others))


def test_a_pass_is_one_all_reduce(opened, validation, monkeypatch):
    """For the losses, for the average's, and for the actions: sums, counts, failures and stops travel together."""
    *_, (policy, replicas, average) = opened
    calls, plain_sum = [], World.sum
    monkeypatch.setattr(World, "sum", lambda world, tensor: calls.append(tensor.numel()) or plain_sum(world, tensor))
    validation(0).run(policy, replicas, None)
    assert len(calls) == 2
    validation(0).run(policy, replicas, average)
    assert len(calls) == 2 + 3 and calls[0] == calls[2] == calls[3]
