"""Requests that wait become batches; each fails by itself, and none is lost."""

import logging
import threading
from dataclasses import dataclass, field, fields

import numpy as np
import pytest

from opentau_train.deploy.limits import Limits, UnsafeActions
from opentau_train.deploy.policy import RobotPolicy
from opentau_train.deploy.serving.answers import Answers, Busy
from opentau_train.deploy.serving.requests import Terms
from opentau_train.errors import Fault, UserError


@dataclass(frozen=True)
class Held(RobotPolicy):
    """Computes a batch when `go` is set, having set `began`; fails where `broken` has something."""

    began: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    broken: list = field(default_factory=list)
    sizes: list = field(default_factory=list)

    def sample(self, batch, steps=None):
        self.began.set()
        assert self.go.wait(30)
        self.sizes.append(len(batch))
        if self.broken:
            raise self.broken.pop()
        return super().sample(batch, steps)


@pytest.fixture
def held(policy):
    return Held(**{f.name: getattr(policy, f.name) for f in fields(RobotPolicy)})


def observed(state=1.0):
    return {"front": np.full((64, 96, 3), 9, np.uint8), "state": np.full(4, state), "task": "go"}


def test_what_waits_is_the_next_batch_in_its_order(held, policy):
    terms = Terms(held, max_batch=3)
    answers = Answers(terms, 10)
    first = answers.submit(terms.request(observed()))
    held.began.wait(30)
    rest = [
        answers.submit(terms.request({**observed(i), **more})) for i, more in enumerate([{}, {"steps": 2}, {}, {}, {}])
    ]
    held.go.set()
    sizes = [future.result(30).batch_size for future in [first, *rest]]
    assert sizes == [1, 3, 1, 3, 3, 1] and held.sizes == [1, 3, 1, 1], "one kind a batch, three at most"
    np.testing.assert_array_equal(first.result().actions, policy.act(observed()))
    together = policy.act([observed(0), observed(2), observed(3)])
    np.testing.assert_array_equal([rest[i].result().actions for i in (0, 2, 3)], together)
    assert answers.num_answered == 6 and answers.num_batches == 4 and answers.close(30)


def test_more_than_may_wait_are_refused_and_who_is_gone_is_left_out(held):
    terms = Terms(held)
    answers = Answers(terms, 2)
    request = terms.request(observed())
    first = answers.submit(request)
    held.began.wait(30)
    second, third = answers.submit(request), answers.submit(request)
    with pytest.raises(Busy, match="2 requests wait"):
        answers.submit(request)
    second.cancel()
    fourth = answers.submit(request)
    held.go.set()
    assert first.result(30).batch_size == 1 and third.result(30).batch_size == fourth.result(30).batch_size == 2
    assert answers.close(30) and answers.num_answered == 3


def test_a_bad_observation_of_a_batch_fails_alone(held, policy):
    terms = Terms(held)
    answers = Answers(terms, 10)
    first = answers.submit(terms.request(observed()))
    held.began.wait(30)
    bad, good = answers.submit(terms.request(observed(np.nan))), answers.submit(terms.request(observed(2)))
    held.go.set()
    with pytest.raises(UserError, match="there is no finite number"):
        bad.result(30)
    np.testing.assert_array_equal(good.result(30).actions, policy.act(observed(2)))
    assert first.result(30) and answers.healthy and answers.close(30)


def test_where_a_batch_cannot_be_computed_each_is_by_itself(held):
    terms = Terms(held)
    answers = Answers(terms, 10)
    first = answers.submit(terms.request(observed()))
    held.began.wait(30)
    two = [answers.submit(terms.request(observed(i))) for i in range(2)]
    held.broken.extend([UserError("the second one"), UserError("both"), RuntimeError("never mind")])
    held.go.set()
    with pytest.raises(Fault, match="the server failed: RuntimeError"):
        first.result(30)
    with pytest.raises(UserError, match="the second one"):
        two[0].result(30)
    assert two[1].result(30).batch_size == 1 and held.sizes == [1, 2, 1, 1] and answers.close(30)


def test_a_failure_of_its_own_is_told_without_its_words_and_shows_in_its_health(held, caplog):
    terms = Terms(held)
    answers = Answers(terms, 10)
    held.go.set()
    held.broken.append(RuntimeError("at /a/path/of/the/server"))
    with caplog.at_level(logging.ERROR), pytest.raises(Fault) as caught:
        answers.submit(terms.request(observed())).result(30)
    assert "the server failed: RuntimeError" in str(caught.value) and "path" not in str(caught.value)
    assert not answers.healthy and "at /a/path/of/the/server" in caplog.text
    assert answers.submit(terms.request(observed())).result(30) and answers.healthy and answers.close(30)


def test_limits_are_those_of_act_for_each_by_itself(policy):
    wide, none = Limits("refuse", margin=1e6), Limits("refuse", margin=0.0)
    for limits, refused in ((wide, False), (none, True)):
        terms = Terms(policy, limits=limits)
        answers = Answers(terms, 10)
        future = answers.submit(terms.request(observed()))
        if refused:
            with pytest.raises(UnsafeActions):
                future.result(30)
        else:
            np.testing.assert_array_equal(future.result(30).actions, policy.act(observed(), limits=limits))
        assert answers.close(30)


def test_what_waits_when_it_closes_is_given_up(held):
    terms = Terms(held)
    answers = Answers(terms, 10)
    first = answers.submit(terms.request(observed()))
    held.began.wait(30)
    second = answers.submit(terms.request(observed()))
    assert not answers.close(0.01)
    held.go.set()
    assert first.result(30) and answers.close(30) and second.cancelled()
