"""Real simulators, each run for real: `make test-simulation`."""
