"""Indexed tar shards: rows of a data set in a few large files, on a disk or behind a URL."""
