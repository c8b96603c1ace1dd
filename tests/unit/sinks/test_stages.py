"""The time left counts what a run does beside its steps."""

from __future__ import annotations

import pytest

from opentau_train.sinks.stages import SAVE, VALIDATION, Clock, stage_of


class Watch:
    """A clock that a test moves."""

    time = 0.0

    def __call__(self) -> float:
        return self.time


def run_until(clock: Clock, watch: Watch, step: int) -> None:
    """Steps of a second, validations of 30 and saves of 10."""
    for number in range(clock.start + 1, step + 1):
        watch.time += 1.0
        for stage, seconds in ((SAVE, 10.0), (VALIDATION, 30.0)):
            every = clock.every.get(stage)
            if every and number % every == 0:
                clock.enter(stage)
                watch.time += seconds
        clock.enter(None)


@pytest.mark.parametrize("start", [0, 60])
def test_time_left_is_that_of_the_steps_and_of_the_validations_and_saves_to_come(start):
    watch = Watch()
    clock = Clock(start, 200, {VALIDATION: 20, SAVE: 50}, watch)
    assert clock.left(start) == pytest.approx(0.0), "nothing is known yet"
    run_until(clock, watch, 120)
    assert clock.left(120) == pytest.approx(80 * 1.0 + 4 * 30.0 + 2 * 10.0)


def test_a_validation_under_way_is_no_time_of_the_steps():
    watch = Watch()
    clock = Clock(0, 100, {VALIDATION: 50}, watch)
    run_until(clock, watch, 49)
    clock.enter(VALIDATION)
    watch.time += 500.0
    assert clock.left(49) == pytest.approx(51.0)


def test_how_often_something_comes_counts_the_last_step():
    clock = Clock(0, 105, {VALIDATION: 20, SAVE: 0, "other": None})
    assert [clock.num_to_come(VALIDATION, step) for step in (0, 19, 20, 100, 105)] == [6, 6, 5, 1, 0]
    assert clock.num_to_come(SAVE, 3) == 1 and clock.num_to_come(SAVE, 105) == clock.num_to_come("other", 3) == 0


def test_parts_of_a_run_belong_to_the_stages_that_are_shown():
    assert {stage_of(part) for part in ("validation", "all-reduce of the validation", "rollout of reach")} == {
        VALIDATION
    }
    assert stage_of("save") == SAVE and stage_of("data wait") is stage_of("log") is stage_of("closing") is None
