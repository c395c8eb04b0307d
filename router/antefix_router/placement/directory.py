"""Which worker holds which blocks in memory, as far as events and this router's own placements tell.

The directory only guides placement: a worker that has lost a block reads it from the store. A block is identified by 64
bits of its hash (a collision only costs a wrong guess). The block's holders are the bits of one number, stored once
for all blocks with the same holders. A block takes about 100 bytes, whatever the number of its holders.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from antefix.events.block_events import Key

# When this many workers are gone, their bits are removed from all blocks in one pass. One by one would cost a pass
# each.
_GONE_MAX = 64
# Distinct sets of holders that are stored once for several blocks. Further sets are stored per block.
_SETS_MAX = 1 << 16


class Directory:
    """The directory's size is bounded: it has two generations, each with half of the blocks. Using a block moves it to
    the young generation; when the young generation is full, the old one is dropped. The effect is close to least
    recently used, without a cost per block.
    """

    def __init__(self, num_blocks_max: int = 1 << 20) -> None:
        self._half = max(1, num_blocks_max // 2)
        self._young: dict[Key, int] = {}
        self._old: dict[Key, int] = {}
        self._sets: dict[int, int] = {}
        self._bit: dict[str, int] = {}
        self._row: dict[int, str] = {}
        self._serials: dict[str, int] = {}
        self._num_known = 0
        self._telling: set[str] = set()
        self._num_changes = 0
        self._asked: tuple[int, list[str], npt.NDArray[np.int64], int] | None = None
        self._gone = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def placed(self, address: str, keys: Sequence[Key]) -> None:
        """Record that the worker holds these blocks of one chain, or soon will."""
        bit = 1 << self._bit_of(address)
        for first in range(0, len(keys), self._half):
            self._placed(bit, keys[first : first + self._half])

    def _placed(self, bit: int, keys: Sequence[Key]) -> None:
        # Looking up all blocks at once, and adding all that no worker holds in one step, takes a fifth of the time.
        young, old = self._young, self._old
        holders = list(map(young.get, keys))
        unknown = [key for key, held in zip(keys, holders, strict=True) if held is None]
        if unknown:
            if len(young) + len(unknown) > self._half:
                self._old, self._young = young, {}
                return self._placed(bit, keys)
            moved = [] if old.keys().isdisjoint(unknown) else [key for key in unknown if key in old]
            young.update(dict.fromkeys(unknown, self._shared(bit)))
            for key in moved:
                young[key] = self._shared(old.pop(key) | bit)
        if len(unknown) == len(keys):
            return None
        for key, held in zip(keys, holders, strict=True):
            if held is not None and not held & bit:
                young[key] = self._shared(held | bit)
        return None

    def evicted(self, address: str, keys: Sequence[Key]) -> None:
        """Record the worker's report that it has dropped these blocks."""
        keep = ~(1 << self._bit_of(address))
        for key in keys:
            for part in (self._young, self._old):
                held = part.get(key)
                if held is None:
                    continue
                if held & keep:
                    part[key] = self._shared(held & keep)
                else:
                    del part[key]

    def guess(self, address: str, keys: Sequence[Key]) -> None:
        """Record that a request was placed on this worker, so that the worker holds the request's blocks or soon will.
        For a worker with events, a placement is ignored.
        """
        if address not in self._telling:
            self.placed(address, keys)

    def know(self, address: str) -> int:
        """Record that the worker reports its contents by events from now on. Returns the serial number of the worker's
        entry.
        """
        self._bit_of(address)
        self._telling.add(address)
        return self._serials[address]

    def doubt(self, address: str) -> None:
        """Record that the worker's events are no longer up to date. The worker's known blocks are kept as guesses, and
        `guess` counts again.
        """
        self._telling.discard(address)

    def serial(self, address: str) -> int:
        """The serial number of the worker's entry, which changes after the worker was forgotten; 0: the worker has no
        entry.
        """
        return self._serials.get(address, 0)

    def forget(self, address: str) -> None:
        """Drop all blocks of a worker that died or was replaced, because its memory is lost."""
        bit = self._bit.pop(address, None)
        self._serials.pop(address, None)
        self._telling.discard(address)
        if bit is None:
            return
        del self._row[bit]
        self._num_changes += 1
        self._gone |= 1 << bit
        if self._gone.bit_count() > _GONE_MAX:
            self._sweep()

    def leading(self, addresses: Sequence[str], keys: Sequence[Key]) -> npt.NDArray[np.int64]:
        """How many of the chain's first blocks each worker probably holds; [len(addresses)].

        Each worker holds a leading part of the chain, because a worker drops the end of a prefix first. So one
        bisection finds the numbers for all workers.
        """
        depths: dict[int, int] = {}
        rows, mask = self._bits_of(addresses)
        spans = [(0, len(keys), mask & self._held(keys[0]))] if keys else []
        # One more entry than there are bits; the last one stands for workers without a bit.
        found = np.zeros(mask.bit_length() + 1, np.int64)
        while spans:
            low, high, holders = spans.pop()
            if not holders:
                continue
            if low == high:
                depths[holders] = low
                continue
            middle = (low + high + 1) // 2
            deeper = holders & self._held(keys[middle - 1])
            spans.append((middle, high, deeper))
            spans.append((low, middle - 1, holders & ~deeper))
        for holders, depth in depths.items():
            found[_bits(holders)] = depth
        return found[rows]

    def _bits_of(self, addresses: Sequence[str]) -> tuple[npt.NDArray[np.int64], int]:
        """The bit of each worker, or -1, and all bits together. The result is cached, because the same workers are
        looked up again and again.
        """
        if self._asked is None or self._asked[0] != self._num_changes or self._asked[1] != addresses:
            bits = [self._bit.get(address, -1) for address in addresses]
            mask = sum(1 << bit for bit in bits if bit >= 0)
            self._asked = self._num_changes, list(addresses), np.array(bits, np.int64), mask
        return self._asked[2], self._asked[3]

    def _held(self, key: Key) -> int:
        held = self._young.get(key)
        return self._old.get(key, 0) if held is None else held

    def _bit_of(self, address: str) -> int:
        bit = self._bit.get(address)
        if bit is None:
            bit = 0
            while bit in self._row or self._gone >> bit & 1:
                bit += 1
            self._bit[address], self._row[bit] = bit, address
            self._num_changes += 1
            self._num_known += 1
            self._serials[address] = self._num_known
        return bit

    def _shared(self, holders: int) -> int:
        if len(self._sets) > _SETS_MAX:
            self._sets.clear()
        return self._sets.setdefault(holders, holders)

    def _sweep(self) -> None:
        keep = ~self._gone
        for part in (self._young, self._old):
            for key in [key for key, held in part.items() if held & self._gone]:
                if part[key] & keep:
                    part[key] = self._shared(part[key] & keep)
                else:
                    del part[key]
        self._gone = 0


def _bits(holders: int) -> npt.NDArray[np.int64]:
    raw = np.frombuffer(holders.to_bytes((holders.bit_length() + 7) // 8, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(raw, bitorder="little"))
