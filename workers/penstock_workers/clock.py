"""The one clock of a worker process that says Unix seconds: its broker's."""

from typing import Final

from penstock.clock import Clock

BROKER_CLOCK: Final = Clock()
"""Deadlines of jobs are by it, and when they came; told by heartbeats and the channel that pops."""
