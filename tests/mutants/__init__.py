"""Bugs put into the program on purpose, to see whether the fast tests notice: `make mutants`."""
