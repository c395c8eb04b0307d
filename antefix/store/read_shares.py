"""Which tier reads which part of a prefix: pieces in order, each to the tier that would have it first. Pure.

Nearest first follows from that: a nearer tier is faster, until so much waits for it that a farther one would be done
sooner. Used by the reader of several tiers for what is there at the start, and again for what a tier could not give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from antefix.record import Held

# Payload bytes that are lost when a tier breaks off, at most; and enough that a call costs nothing next to its bytes.
PIECE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Blocks [start, stop) of what is read. holders: numbers of the tiers that should have all of them.

    late: of those that have it too and took too long; they are asked again when nobody else has it.
    """

    start: int
    stop: int
    holders: frozenset[int]
    late: frozenset[int] = frozenset()

    @property
    def num_blocks(self) -> int:
        return self.stop - self.start

    def after(self, num_good: int, *, without: frozenset[int], late: frozenset[int] = frozenset()) -> Piece:
        """What is left when that many blocks have come, and to whom it may go now."""
        holders, late = self.holders - without - late, (self.late | late) - without
        if not holders:
            holders, late = late, frozenset()
        return Piece(start=self.start + num_good, stop=self.stop, holders=holders, late=late)


def pieces_of(held: Mapping[int, Held], num_blocks: int, block_bytes: int) -> list[Piece]:
    """The leading blocks that any tier holds, in pieces of one set of holders each. held: by the tiers' numbers."""
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
    """Stretches of blocks that have the same holders."""
    changes: dict[int, set[int]] = {0: set(), num_blocks: set()}
    for tier, has in held.items():
        for start, stop in has.spans:
            changes.setdefault(min(start, num_blocks), set()).add(tier)
            changes.setdefault(min(stop, num_blocks), set()).add(tier)
    holders: set[int] = set()
    bounds = sorted(changes)
    for start, stop in pairwise(bounds):
        # A tier's spans lie apart, so at each of its bounds it begins or ends.
        holders ^= changes[start]
        yield start, stop, frozenset(holders)


class Shares:
    """Pieces that wait, by tier.  seconds: how long a tier would take for so many bytes."""

    def __init__(self, seconds: Callable[[int, int], float], block_bytes: int) -> None:
        self._seconds = seconds
        self._block_bytes = block_bytes
        self.waiting: dict[int, list[Piece]] = {}
        self._busy_s: dict[int, float] = {}

    def give(self, pieces: Sequence[Piece]) -> None:
        """Each must have a holder."""
        for piece in pieces:
            tier = min(piece.holders, key=lambda tier: (self._done_s(tier, piece), tier))
            self._busy_s[tier] = self._done_s(tier, piece)
            queue = self.waiting.setdefault(tier, [])
            queue.append(piece)
            queue.sort(key=lambda each: each.start)

    def take(self, tier: int) -> Piece | None:
        """The next one for this tier."""
        queue = self.waiting.get(tier)
        return queue.pop(0) if queue else None

    def take_back(self, tier: int) -> list[Piece]:
        """All that waits for a tier that failed."""
        return self.waiting.pop(tier, [])

    def drop_from(self, block: int) -> None:
        """Nothing from this block on is wanted any more."""
        for tier, queue in self.waiting.items():
            self.waiting[tier] = [piece for piece in queue if piece.start < block]

    def _done_s(self, tier: int, piece: Piece) -> float:
        busy = self._busy_s.get(tier, 0.0)
        nbytes = piece.num_blocks * self._block_bytes
        # A call's latency is hidden by the one before it.
        latency = self._seconds(tier, 0) if busy else 0.0
        return busy + max(0.0, self._seconds(tier, nbytes) - latency)
