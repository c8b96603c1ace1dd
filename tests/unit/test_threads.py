"""What a call on one thread gave or raised reaches the thread that asks."""

import threading

import pytest

from opentau_train.threads import Background, outcome


def test_a_result_is_given_and_every_kind_of_error_is_raised_where_it_is_asked_for():
    assert outcome(lambda: 3).result() == 3
    for error in (ValueError("a"), StopIteration("b"), KeyboardInterrupt(), SystemExit(4)):

        def call(error=error):
            raise error

        answer = outcome(call)
        with pytest.raises(type(error)) as raised:
            answer.result()
        assert raised.value is error


def test_a_call_s_own_timeout_is_not_taken_for_a_missing_answer():
    calls, hang = Background("it", "nothing is lost"), threading.Event()

    def call():
        raise TimeoutError("the server's own words")

    with pytest.raises(TimeoutError, match="the server's own words"):
        calls.ask(call, 5.0)
    with pytest.raises(TimeoutError, match=r"no answer in 0\.1 s"):
        calls.ask(hang.wait, 0.1)
    hang.set()
    assert calls.close(5.0)
