"""Assigns the pieces of a prefix to the tiers that can read them: each piece, in order, to the tier that is predicted
to finish it first. No I/O.

This order prefers near tiers, which are faster, until so many pieces wait for a near tier that a tier farther away
would finish sooner. `read_tiers` uses this assignment at the start of a read, and again for the pieces that a tier
failed to deliver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from antefix.record import Held

# The most payload bytes that are lost when a tier breaks off. A read this large makes the cost of a call negligible.
PIECE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Blocks [start, stop) of a read. holders: the numbers of the tiers that should have all these blocks.

    late: numbers of the tiers that have them too but took too long; they are asked again if no other tier has them.
    """

    start: int
    stop: int
    holders: frozenset[int]
    late: frozenset[int] = frozenset()

    @property
    def num_blocks(self) -> int:
        return self.stop - self.start

    def after(self, num_good: int, *, without: frozenset[int], late: frozenset[int] = frozenset()) -> Piece:
        """The rest of a piece after its first `num_good` blocks have arrived, with the tiers that may read that rest
        now.
        """
        holders, late = self.holders - without - late, (self.late | late) - without
        if not holders:
            holders, late = late, frozenset()
        return Piece(start=self.start + num_good, stop=self.stop, holders=holders, late=late)


def pieces_of(held: Mapping[int, Held], num_blocks: int, block_bytes: int) -> list[Piece]:
    """Cut the leading blocks that some tier holds into pieces, each with one set of holders.

    held: which blocks each tier has, by the tier's number.
    """
    blocks_max = max(1, PIECE_BYTES // max(1, block_bytes))
    pieces = []
    for start, stop, holders in _runs(held, num_blocks):
        if not holders:
            break
        pieces += [
            Piece(start=first, stop=min(first + blocks_max, stop), holders=holders)
            for first in range(start, stop, blocks_max)
        ]
    return pieces


def _runs(held: Mapping[int, Held], num_blocks: int) -> Iterator[tuple[int, int, frozenset[int]]]:
    """Consecutive blocks with the same holders: (start, stop, holders)."""
    changes: dict[int, set[int]] = {0: set(), num_blocks: set()}
    for tier, has in held.items():
        for start, stop in has.spans:
            changes.setdefault(min(start, num_blocks), set()).add(tier)
            changes.setdefault(min(stop, num_blocks), set()).add(tier)
    holders: set[int] = set()
    bounds = sorted(changes)
    for start, stop in pairwise(bounds):
        # The spans of a tier do not touch, so each bound either adds the tier or removes it.
        holders ^= changes[start]
        yield start, stop, frozenset(holders)


class Shares:
    """The pieces that wait for each tier. seconds: predicts how long a read takes, from the tier's number and the
    bytes.
    """

    def __init__(self, seconds: Callable[[int, int], float], block_bytes: int) -> None:
        self._seconds = seconds
        self._block_bytes = block_bytes
        self.waiting: dict[int, list[Piece]] = {}
        self._busy_s: dict[int, float] = {}

    def give(self, pieces: Sequence[Piece]) -> None:
        """Assign pieces to tiers. Each piece must have at least one tier that holds it."""
        for piece in pieces:
            tier = min(piece.holders, key=lambda tier: (self._done_s(tier, piece), tier))
            self._busy_s[tier] = self._done_s(tier, piece)
            queue = self.waiting.setdefault(tier, [])
            queue.append(piece)
            queue.sort(key=lambda each: each.start)

    def take(self, tier: int) -> Piece | None:
        """Remove and return the next piece for this tier; None: no piece waits for it."""
        queue = self.waiting.get(tier)
        return queue.pop(0) if queue else None

    def take_back(self, tier: int) -> list[Piece]:
        """Remove and return all pieces that wait for a tier that failed."""
        return self.waiting.pop(tier, [])

    def drop_from(self, block: int) -> None:
        """Drop the waiting pieces that start at this block or later."""
        for tier, queue in self.waiting.items():
            self.waiting[tier] = [piece for piece in queue if piece.start < block]

    def _done_s(self, tier: int, piece: Piece) -> float:
        busy = self._busy_s.get(tier, 0.0)
        nbytes = piece.num_blocks * self._block_bytes
        # The latency of a read is hidden by the read before it.
        latency = self._seconds(tier, 0) if busy else 0.0
        return busy + max(0.0, self._seconds(tier, nbytes) - latency)
