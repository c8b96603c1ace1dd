"""The data that the program makes itself: a small DROID-shaped sample, so that a run needs no download."""
