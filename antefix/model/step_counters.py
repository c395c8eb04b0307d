"""Counters of a worker's decode steps on a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepCounters:
    """graphs_recorded, steps_replayed: counts of CUDA graphs. recording_errors: after the first such error, no graphs
    are used.

    steps_launched: steps of whole batches that ran kernel by kernel, without a graph.
    """

    graphs_recorded: int = 0
    recording_errors: int = 0
    steps_replayed: int = 0
    steps_launched: int = 0
