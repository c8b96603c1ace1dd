"""Fixtures that several files share. Tests run on one thread a process: they share two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
