"""Sums and counts, what a step logs, and the record of its samples."""
