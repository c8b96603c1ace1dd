"""Bytes to arrays: rows of parquet files, frames of videos, pictures."""
