"""Trackers' own packages, in an environment of their own (`make test-trackers`): each takes a run and gives it back."""
