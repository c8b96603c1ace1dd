"""Processes and devices: the world of ranks, policies spread over it, what a step costs them, and who is gone."""
