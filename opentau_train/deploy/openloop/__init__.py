"""The open-loop check: what a policy predicts for a dataset's observations, beside what was recorded."""
