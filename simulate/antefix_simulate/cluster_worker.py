"""A simulated prefill worker: computes one prompt after the other, and keeps units in memory, evicted in LRU order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from antefix_router.placement.backlog import Backlog
from antefix_simulate.trace import TraceRequest


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way through the fleet. names: its units as numbers, like the directory's keys. claimed: units
    registered as being computed.

    row: number of the worker that has the request; -1: none yet.
    """

    request: TraceRequest
    arrived_s: float
    names: list[int]
    claimed: list[int] = field(default_factory=list)
    followers: list[Job] = field(default_factory=list)
    waited_s: float = 0.0
    pending_s: float = 0.0
    ticket: int = 0
    own_tokens: int = 0
    num_moves: int = 0
    row: int = -1


class Memory:
    """Units in a worker's memory, each with or without window state at its end."""

    def __init__(self, num_units_max: int) -> None:
        self._num_units_max = num_units_max
        self._units: OrderedDict[int, bool] = OrderedDict()

    def num_leading(self, names: Sequence[int]) -> int:
        """How many leading units of the prompt are in memory. Ends of prefixes are evicted first, so bisection finds
        the number.
        """
        low, high = 0, len(names)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if names[middle - 1] in self._units else (low, middle - 1)
        return low

    def last_checkpoint(self, names: Sequence[int], num_units: int) -> int:
        """The last boundary up to `num_units` that has window state in memory; 0: there is none."""
        return next((unit for unit in range(num_units, 0, -1) if self._units.get(names[unit - 1])), 0)

    def use(self, names: Sequence[int], checkpoints: Sequence[int]) -> list[int]:
        """Keep these units, with window state after the given numbers of units. Returns the units that were evicted for
        them.
        """
        units = self._units
        marked = {names[unit - 1] for unit in checkpoints}
        # Deepest units first, so that a prefix is evicted after its continuations.
        for name in reversed(names[: self._num_units_max]):
            units[name] = units.pop(name, False) or name in marked
        gone = []
        while len(units) > self._num_units_max:
            gone.append(units.popitem(last=False)[0])
        return gone


@dataclass(slots=True, eq=False)
class PrefillWorker:
    """epoch: increased when the worker dies, so that results of earlier work are ignored."""

    address: str
    memory: Memory
    queue: deque[Job] = field(default_factory=deque)
    running: Job | None = None
    backlog: Backlog = field(default_factory=Backlog)
    busy_s: float = 0.0
    epoch: int = 0
    alive: bool = True
