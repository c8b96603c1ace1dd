"""Closed loop: policies in simulators, their success rate, and demonstrations by scripted experts."""
