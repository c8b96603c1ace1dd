"""Policies: per-sample loss terms from a batch, and actions sampled from one."""
