"""Blocks in a worker's pool: which are in use, which are idle but still valid, and which to evict for room.

All methods are called from the event loop only. A block is private to the sequence that fills it until `publish`. After
`publish` the block never changes, and any sequence with the same chain may use it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from antefix.errors import Overloaded
from antefix.events.memory_log import MemoryLog


class Pool(Protocol):
    """The methods of `antefix.model.BlockPool` that this module uses."""

    num_blocks: int
    num_free: int

    def allocate(self, num_blocks: int, *, after: int | None = None) -> list[int]: ...

    def release(self, block_ids: Sequence[int]) -> None: ...


class ResidentBlocks:
    """Reference counts of a pool's blocks, and a least-recently-used list of finished blocks that nobody uses now.

    events: log of published and evicted blocks, for routers.  on_evicted: called with the name of each evicted block.
    """

    def __init__(self, pool: Pool) -> None:
        self.on_evicted: Callable[[bytes], None] | None = None
        self._pool = pool
        self._refs: dict[int, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._by_hash: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.num_evicted = 0
        self.events = MemoryLog(lambda: self._by_hash)

    @property
    def num_resident(self) -> int:
        return len(self._by_hash)

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can give: free ones and idle ones."""
        return self._pool.num_free + len(self._idle)

    def num_leading(self, hashes: Sequence[bytes]) -> int:
        """How many of the chain's first blocks are in this worker's memory. Does not take a reference."""
        for index, name in enumerate(hashes):
            if name not in self._by_hash:
                return index
        return len(hashes)

    def take(self, hashes: Sequence[bytes]) -> list[int]:
        """Take a reference to the chain's leading blocks that are in memory; `release` must be called afterwards."""
        taken: list[int] = []
        for name in hashes:
            block_id = self._by_hash.get(name)
            if block_id is None:
                break
            self._refs[block_id] = self._refs.get(block_id, 0) + 1
            self._idle.pop(block_id, None)
            taken.append(block_id)
        return taken

    def share(self, block_ids: Sequence[int]) -> None:
        """Take one more reference to blocks that are in use; `release` must be called afterwards."""
        for block_id in block_ids:
            self._refs[block_id] += 1

    def allocate(self, num_blocks: int, *, after: int | None = None) -> list[int]:
        """Private blocks, next to block `after` if possible. If the pool is full, idle blocks are evicted.

        Raises:  Overloaded: too many blocks are in use; nothing was taken.
        """
        if num_blocks > self.num_available:
            raise Overloaded(
                f"the block pool can give {self.num_available} of its {self._pool.num_blocks} blocks, but "
                f"{num_blocks} are needed: send fewer or shorter requests, or raise pool_bytes",
                retry_after_s=1.0,
            )
        while self._pool.num_free < num_blocks:
            self._evict_one()
        block_ids = self._pool.allocate(num_blocks, after=after)
        for block_id in block_ids:
            self._refs[block_id] = 1
        return block_ids

    def publish(self, name: bytes, block_id: int) -> bool:
        """Declare this block finished and its contents exact. Returns False if another block has the name already, so
        that this block stays private.
        """
        if name in self._by_hash:
            return False
        self._by_hash[name] = block_id
        self._hash_of[block_id] = name
        self.events.stored(name)
        return True

    def publish_all(self, names: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """`publish` for many blocks, in a tenth of the time."""
        if not self._by_hash.keys().isdisjoint(names):
            for name, block_id in zip(names, block_ids, strict=True):
                self.publish(name, block_id)
            return
        self._by_hash.update(zip(names, block_ids, strict=True))
        self._hash_of.update(zip(block_ids, names, strict=True))
        self.events.stored_all(names)

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop references. Later blocks of a chain become idle first, so they are evicted before the blocks that they
        extend.
        """
        for block_id in reversed(block_ids):
            self._refs[block_id] -= 1
            if self._refs[block_id]:
                continue
            del self._refs[block_id]
            if block_id in self._hash_of:
                self._idle[block_id] = None
            else:
                self._pool.release([block_id])

    def _evict_one(self) -> None:
        block_id, _ = self._idle.popitem(last=False)
        name = self._hash_of.pop(block_id)
        del self._by_hash[name]
        self.events.evicted(name)
        if self.on_evicted is not None:
            self.on_evicted(name)
        self.num_evicted += 1
        self._pool.release([block_id])
