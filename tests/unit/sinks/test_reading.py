"""Rows that are read before the first step are told where that takes long, and only there."""

from __future__ import annotations

import sys

from opentau_train.log import log_to
from opentau_train.sinks.reading import Reading
from tests.unit.sinks.test_sink_console import shown_on_a_terminal
from tests.unit.sinks.test_stages import Watch

BAR = """
    import logging, sys, time
    from opentau_train.log import log_to
    from opentau_train.sinks import reading
    reading.UNSEEN_SECONDS = 0.2
    with log_to(sys.stderr, is_main=True):
        shown = reading.Reading()
        for done in range(0, 1001, 100):
            shown("reading rows", done, 1000)
            time.sleep(0.05)
        logging.getLogger("opentau_train.x").warning("a warning meanwhile")
        shown("opening", 0, 0)
        shown("reading rows", 1, 2)  # takes no time
        shown.close()
        logging.getLogger("opentau_train.x").warning("the end")
"""


def lines(capsys, seconds: float, shown: bool = True) -> list[str]:
    """What is logged of 20,000 rows that are read in so long, the first hundredth unseen."""
    with log_to(sys.stderr, is_main=True):
        watch = Watch()
        reading = Reading(shown, watch)
        for done in range(1, 101):
            watch.time += seconds / 100
            reading("reading rows", 200 * done, 20_000)
        reading("opening", 0, 0)
        reading.close()
    return capsys.readouterr().err.splitlines()


def test_a_line_every_ten_seconds_tells_rows_and_time_left(capsys):
    assert lines(capsys, 9.0) == [] and lines(capsys, 90.0, shown=False) == []
    told = lines(capsys, 50.0)
    assert len(told) == 4
    assert told[0] == "reading rows: 4,200 of 20,000, 00:40 left"


def test_a_terminal_has_a_bar_until_the_rows_are_read_and_none_where_that_takes_no_time():
    text = shown_on_a_terminal(100, BAR)
    assert "reading rows" in text and "1.00k/1.00k" in text and "/2.00" not in text
    assert text.splitlines()[-1].endswith("the end")
    warning = next(line for line in text.splitlines() if "a warning meanwhile" in line)
    assert warning.rpartition("\r")[2].strip() == "a warning meanwhile"
