"""Tracks the prefixes that are being computed, so that equal ones are computed only once. This module has no tasks: its
callers do the waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from antefix.events.block_events import Key

Flight = TypeVar("Flight")

# A wait is worth this many times the time to compute the shared blocks, because it also saves the computation.
WAIT_FACTOR = 2.0
# Any prediction may be off by this much, so a leader that is late by no more is still waited for.
WAIT_SLACK_S = 2.0


def worth_waiting(remaining_s: float, shared_s: float) -> bool:
    """Whether to wait for blocks that are ready in `remaining_s` and would take `shared_s` to compute."""
    return remaining_s <= WAIT_FACTOR * shared_s


def wait_deadline_s(remaining_s: float, shared_s: float) -> float:
    """The longest wait: the longest predicted wait that would be accepted, plus a tolerance."""
    return WAIT_FACTOR * max(remaining_s, shared_s, 0.0) + WAIT_SLACK_S


class InFlight(Generic[Flight]):
    """Maps a block's key to the request that computes the block. A request in flight is the leader of the blocks it was
    first to claim.

    The map's size is bounded by the running requests: a request's blocks are removed when it ends in any way.
    """

    def __init__(self) -> None:
        self._leaders: dict[Key, Flight] = {}

    def __len__(self) -> int:
        return len(self._leaders)

    def find(self, keys: Sequence[Key], num_stored: int) -> tuple[Flight, int] | None:
        """The request that computes the last block of this chain that any request computes beyond the stored ones, and
        how many blocks lead to it.
        """
        # Most prompts share nothing with those in flight. This is found in one pass of a builtin.
        if self._leaders.keys().isdisjoint(keys[num_stored:]):
            return None
        for index in range(len(keys) - 1, num_stored - 1, -1):
            leader = self._leaders.get(keys[index])
            if leader is not None:
                return leader, index + 1
        return None

    def lead(self, flight: Flight, keys: Sequence[Key], num_stored: int) -> list[Key]:
        """Claim the blocks that no other request computes yet. Returns the keys to pass to `end`."""
        claimed = [key for key in keys[num_stored:] if key not in self._leaders]
        self._leaders.update(dict.fromkeys(claimed, flight))
        return claimed

    def end(self, claimed: Sequence[Key]) -> None:
        for key in claimed:
            del self._leaders[key]
