"""Processes and devices: the world of ranks, policies spread over it, and who is gone or stands still."""
