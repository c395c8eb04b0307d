"""Which worker probably has which blocks in memory, as far as this router's own placements tell.

A guess that only steers placement: a worker that has lost a block reads it from the store. Bounded per worker, least
recently used first out, as the workers' pools are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Directory:
    """Worker address -> recently placed block hashes. One entry takes about 150 bytes."""

    def __init__(self, num_blocks_max: int = 1 << 17) -> None:
        self._num_blocks_max = num_blocks_max
        self._blocks: dict[str, OrderedDict[bytes, None]] = {}

    def placed(self, address: str, hashes: Sequence[bytes]) -> None:
        """The worker has, or will soon have, these blocks."""
        blocks = self._blocks.setdefault(address, OrderedDict())
        # Deepest first, so that a prefix outlives what continues it.
        for name in reversed(hashes[-self._num_blocks_max :]):
            blocks[name] = None
            blocks.move_to_end(name)
        while len(blocks) > self._num_blocks_max:
            blocks.popitem(last=False)

    def forget(self, address: str) -> None:
        """The worker died or was replaced: its memory is gone."""
        self._blocks.pop(address, None)

    def num_leading(self, address: str, hashes: Sequence[bytes]) -> int:
        """How many of the chain's first blocks the worker probably has. Bisection: prefixes outlive their ends."""
        blocks = self._blocks.get(address)
        if not blocks:
            return 0
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in blocks:
                low = middle + 1
            else:
                high = middle
        return low
