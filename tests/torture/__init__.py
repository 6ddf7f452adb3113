"""Processes that are hurt on purpose, by `make torture` and by a few tests."""

POISON = "poison"
"""A prompt with this kills the worker process of a crew that obeys."""
