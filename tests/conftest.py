"""Fixtures that several files share. Tests run on one thread a process: they share two cores."""

import gc
import logging
import os
import signal
import sys

import pytest
from hypothesis import settings

from tests import compose_once, retry
from tests.retry import pytest_runtest_protocol, pytest_terminal_summary  # noqa: F401  pytest takes its hooks from here

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A suite that is started in the background without job control inherits ignored SIGINT and SIGQUIT, and so would every
# process that it starts; bash can't even trap a signal that it found ignored.
for number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

compose_once.remember()


def pytest_collection_modifyitems(items):
    retry.pytest_collection_modifyitems(items)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)  # else it would end long after the others


def pytest_collection_finish():
    if "torch" in sys.modules:
        from tests import rehearse_once

        rehearse_once.remember()
    share_with_the_tests_to_come()


shared = 0


def share_with_the_tests_to_come():
    """Garbage collections, of which each training here makes some, need not go through what is there for all tests:
    the modules, thousands of objects each, of which a test may import the first of its kind."""
    global shared
    if len(sys.modules) > shared + 20:
        gc.collect()
        gc.freeze()
        shared = len(sys.modules)


def pytest_runtest_teardown(nextitem):
    if nextitem is not None:
        share_with_the_tests_to_come()


# HYPOTHESIS_PROFILE=nightly searches for long; a property that starts processes takes a share of the profile's number.
settings.register_profile("fast", max_examples=40, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(autouse=True)
def a_log_as_a_new_process_has_it():
    """What ran before in this process (a program of another test, a library that disables all loggers that it finds)
    must not hide what the program says in this one. Hydra sets the root's level when it runs in this process."""
    program = logging.getLogger("opentau_train")
    program.propagate, program.handlers = True, []
    if (logging.root.manager.disable, logging.root.level, program.level) != (0, logging.WARNING, logging.NOTSET):
        logging.disable(logging.NOTSET)
        logging.root.setLevel(logging.WARNING)
        program.setLevel(logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("opentau_train") and isinstance(logger, logging.Logger):
            logger.disabled = False
