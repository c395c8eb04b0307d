"""What a worker counts of its decode steps on a card."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepCounters:
    """graphs_recorded, steps_replayed: as CUDA graphs.  recording_errors: after the first one, steps are launched.

    steps_launched: those of whole batches that were no graph's.
    """

    graphs_recorded: int = 0
    recording_errors: int = 0
    steps_replayed: int = 0
    steps_launched: int = 0
