"""Datasets that lie on a server: their files are fetched into a cache that the processes of a node share."""
