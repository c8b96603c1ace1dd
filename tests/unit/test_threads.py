"""What a call on one thread gave or raised reaches the thread that asks."""

import threading
import time

import pytest

from opentau_train import threads
from opentau_train.sinks.background import Background
from opentau_train.threads import InterruptibleIterator, settle


def test_a_result_is_given_and_every_kind_of_error_is_raised_where_it_is_asked_for():
    assert settle(lambda: 3).result() == 3
    for error in (ValueError("a"), StopIteration("b"), KeyboardInterrupt(), SystemExit(4)):

        def call(error=error):
            raise error

        answer = settle(call)
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


# -- an iterator one item ahead ----------------------------------------------------------------------------------------


def numbers(made: list[int]):
    for number in range(4):
        made.append(number)
        yield number


@pytest.mark.parametrize("ahead", [False, True])
def test_an_iterator_ahead_gives_the_same_items_and_has_made_one_more(ahead):
    made: list[int] = []
    iterator = InterruptibleIterator(numbers(made), ahead=ahead)
    for number in range(4):
        assert iterator.next(lambda: 0) == number
        wanted = min(number + 2, 4) if ahead else number + 1
        end = time.monotonic() + 30
        while len(made) < wanted and time.monotonic() < end:
            time.sleep(0.01)
        assert made == list(range(wanted))
    with pytest.raises(StopIteration):
        iterator.next(lambda: 0)
    iterator.close()


def test_an_item_ahead_that_hangs_does_not_keep_a_run_from_ending(monkeypatch):
    monkeypatch.setattr(threads, "CLOSE_SECONDS", 0.1)
    release = threading.Event()

    def items():
        yield 1
        release.wait()

    iterator = InterruptibleIterator(items(), ahead=True)
    assert iterator.next(lambda: 0) == 1
    closing = threading.Thread(target=iterator.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    release.set()
