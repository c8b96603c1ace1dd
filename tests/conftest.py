"""Fixtures that several files share. Tests run on one thread a process: they share two cores."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# HYPOTHESIS_PROFILE=nightly searches for long; a property that starts processes takes a share of the profile's number.
settings.register_profile("fast", max_examples=40, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))
