"""The processes that begin with their imports done (tests/warm.py) are as new ones."""

from __future__ import annotations

import sys

import pytest

from tests import warm

OPEN_FILES = """
import gc, io, socket
gc.unfreeze()
files = [o for o in gc.get_objects() if isinstance(o, (io.IOBase, socket.socket)) and not getattr(o, "closed", False)]
print([file for file in files if file.fileno() > 2])
"""


@pytest.mark.slow
def test_a_warm_process_has_no_object_of_a_file_that_it_does_not_have():
    """Such an object closes, when it is freed, whichever file has its number by then: the program's."""
    ended = warm.run([sys.executable, "-c", OPEN_FILES])
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr
