"""Episodes are run exactly once and come out the same however they are spread, and whatever their simulators do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from opentau_train.errors import Fault, UserError
from opentau_train.simulation.rollout import Rollouts, Running, owned, start_seed
from opentau_train.simulation.success import success_row, wilson
from tests.program import REPO
from tests.simulators import line

CHUNK = 4


def played(tree, rollouts, rank=0, size=1):
    """(results, {episode: keys}, films, simulators lost) of a rank whose policy goes on by what it sees."""
    keys = {}
    with closing(Running("line", tree, rollouts, rank, size)) as running:
        while running.active:
            seen, drawn = running.observations()
            for slot, key in zip(running._slots, drawn, strict=True):
                if slot.queue:
                    keys.setdefault(slot.queue[0], []).append(key)
            noise = np.array([key % 7 for key in drawn])[:, None] / 200
            steps = np.stack([s.state for s in seen]).clip(-0.1, 0.1) - noise
            running.take(np.repeat(steps[:, None].astype(np.float32), CHUNK, axis=1))
        return running.results, keys, running.films, running.num_lost


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_each_episode_has_one_rank_and_one_slot(episodes, slots, ranks):
    """The slot depends on the episode alone."""
    places = [
        (e, s) for rank in range(ranks) for s, queue in enumerate(owned(episodes, slots, rank, ranks)) for e in queue
    ]
    assert sorted(places) == [(e, e % slots) for e in range(episodes)]


@pytest.fixture(scope="module")
def alone():
    return played(line(), Rollouts(episodes=7, horizon=3, simulators=2))


@pytest.mark.slow
def test_results_and_draws_are_the_same_on_any_ranks(alone):
    results, keys, films, _ = alone
    assert (results[:, 0] == 1).any() and len(set(results[:, 1])) > 2 and (results[:, 2] == 1).all()
    assert sorted(films) == [0, 1] and len(films[0]) == results[0, 1] + 1
    parts = [played(line(), Rollouts(episodes=7, horizon=3, simulators=2), rank, 3) for rank in range(3)]
    np.testing.assert_array_equal(sum(part[0] for part in parts), results)
    assert {e: k for part in parts for e, k in part[1].items()} == keys
    assert len({key for one in keys.values() for key in one}) == sum(map(len, keys.values()))


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize(
    ("fault", "text"), [("crash", "crashed with exit code 7: about to crash"), ("hang", "hung: no answer within 4 s")]
)
def test_a_simulator_that_is_lost_is_replaced_and_counted(alone, tmp_path, caplog, fault, text):
    tree = line(folder=str(tmp_path), **{fault: 4})
    with caplog.at_level(logging.WARNING, "opentau_train"):
        results, _, films, num_lost = played(tree, Rollouts(episodes=7, horizon=3, simulators=2, timeout=4.0))
    np.testing.assert_array_equal(results, alone[0])
    assert num_lost == 1 and len(films[0]) == results[0, 1] + 1
    assert text in caplog.text


@pytest.mark.slow
def test_an_episode_that_always_ends_its_simulator_is_an_error(tmp_path):
    with pytest.raises(Fault) as error:
        played(line(crash=2, always=True), Rollouts(episodes=1, simulators=1))
    assert "lost 3 times: it crashed with exit code 7" in str(error.value)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"success": "one"}, ["a step's info has no 'one'", "won"]),
        ({"cameras": {"eye": "eyes"}}, ["has no 'eyes': did you mean 'eye'?", "place, eye"]),
        ({"state": "place/x"}, ["has no 'place/x'", "it is ndarray"]),
        ({"env": {"_target_": "no_such_simulator.make"}, "install": "pip install it"}, ["install it: pip install it"]),
        ({"env": {"_target_": "tests.simulators.Line", "sise": 3}}, ["did you mean 'size'?"]),
        ({"fps": 0}, ["line.fps must be greater than 0"]),
        ({"expert_noise": [0.1, 0.1]}, ["expert_noise has 2 numbers, an action 1"]),
    ],
)
def test_a_mistake_of_a_declaration_is_told(change, texts):
    with pytest.raises(UserError) as error:
        played({**line(), **change}, Rollouts(episodes=1, simulators=1))
    assert all(text in str(error.value) for text in texts), error.value


def test_a_simulator_ends_with_its_caller_even_where_it_hangs(tmp_path):
    """The caller is killed while it waits for a simulator that sleeps."""
    code = (
        "import os, sys; from tests.simulators import line;"
        "from opentau_train.simulation.process import SimulatorProcess;"
        f"p = SimulatorProcess(line(folder={str(tmp_path)!r}, hang=1), 60.0); p.ask('reset', 0); p.answer();"
        "p.ask('act', [[0.0]], False); print(p._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    simulator = Path(f"/proc/{int(done.stdout)}")
    for _ in range(200):
        if not simulator.exists() or "\nState:\tZ" in (simulator / "status").read_text():
            return
        time.sleep(0.1)
    os.kill(int(simulator.name), 9)
    pytest.fail("it is still there")


def test_evaluations_start_where_no_demonstration_did():
    from opentau_train.simulation.demonstrations import attempt_seed

    starts = {start_seed(seed, e) for seed in range(3) for e in range(100)}
    assert len(starts) == 300 and not starts & {attempt_seed(seed, k) for seed in range(3) for k in range(200)}


@given(st.integers(0, 50), st.integers(1, 50))
def test_intervals_are_wilsons(successes, more):
    num = max(successes, more)
    reference = binomtest(successes, num).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(successes, num), reference, atol=1e-12)


def test_episodes_that_got_lost_or_ran_twice_are_an_error():
    results = np.ones((4, 3))
    assert success_row(results, 1.0, "a")["a/Success"] == 1.0
    for times in (0, 2):
        results[2, 2] = times
        with pytest.raises(RuntimeError, match=f"episode 2 was run {times} times"):
            success_row(results, 0.0, "a")
