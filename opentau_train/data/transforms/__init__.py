"""Between the raw window and the sample, and back: what a dataset, the mixture and a policy do to a window's values."""
