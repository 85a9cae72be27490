"""The broker's time in Unix seconds: one clock for a whole worker process, from heartbeat to batches."""

from typing import Final

from penstock.clock import Clock

BROKER_CLOCK: Final = Clock()
"""Measures arrivals and deadlines of jobs; heartbeats and the channel that pops set it."""
