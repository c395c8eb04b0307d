"""Prefixes that are being computed now, so that equal ones are computed once. Pure: who waits, and how, is others'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from antefix.events.block_events import Key

Flight = TypeVar("Flight")

# Waiting is worth it up to so many times what computing the shared blocks would take: it spares the work itself, too.
WAIT_FACTOR = 2.0
# Predictions are off by so much in any case; a leader that is late by it is not given up yet.
WAIT_SLACK_S = 2.0


def worth_waiting(remaining_s: float, shared_s: float) -> bool:
    """Whether to wait for blocks that will be there in `remaining_s` and would take `shared_s` to compute."""
    return remaining_s <= WAIT_FACTOR * shared_s


def wait_deadline_s(remaining_s: float, shared_s: float) -> float:
    """How long to wait at most: as long as would have been accepted, and the slack."""
    return WAIT_FACTOR * max(remaining_s, shared_s, 0.0) + WAIT_SLACK_S


class InFlight(Generic[Flight]):
    """Block key -> the request that computes it. A request in flight is the leader of the blocks it was first to claim.

    Bounded by the requests that run: a flight's blocks are given back when it ends, however it ends.
    """

    def __init__(self) -> None:
        self._leaders: dict[Key, Flight] = {}

    def __len__(self) -> int:
        return len(self._leaders)

    def find(self, keys: Sequence[Key], num_stored: int) -> tuple[Flight, int] | None:
        """Who computes the deepest block of this chain beyond the stored ones, and how many blocks lead to it."""
        # Most prompts share nothing with those in flight; to see that takes one pass without a line of Python.
        if self._leaders.keys().isdisjoint(keys[num_stored:]):
            return None
        for index in range(len(keys) - 1, num_stored - 1, -1):
            leader = self._leaders.get(keys[index])
            if leader is not None:
                return leader, index + 1
        return None

    def lead(self, flight: Flight, keys: Sequence[Key], num_stored: int) -> list[Key]:
        """Claim what nobody computes yet; returns the keys to hand to `end`."""
        claimed = [key for key in keys[num_stored:] if key not in self._leaders]
        self._leaders.update(dict.fromkeys(claimed, flight))
        return claimed

    def end(self, claimed: Sequence[Key]) -> None:
        for key in claimed:
            del self._leaders[key]
