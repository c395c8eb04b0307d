"""The simulated store: bytes only, kept and evicted by the real policy (`antefix_kvstore.eviction`).

Names: a unit of a prefix has its name in the trace. The lowest bit of a name tells a block's record from its
checkpoint; as in the engine, a checkpoint depends on its block. The lifetime of blocks, three days, exceeds any trace,
so it is left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from antefix.window import Sizes, Tier
from antefix_kvstore.eviction import EvictionPolicy, Forest, ahead_bytes
from antefix_simulate.trace import Names

# As in the engine, eviction frees a little more than needed, so that not every put has to evict.
_POOL_STEP_SHARE = 1 / 128
# Expired checkpoints are unusable at once; when space is short, their bytes are freed this often.
_SWEEP_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """store_bytes: the limit for blocks and checkpoints together; None: unlimited. pool_bytes: the limit for the window
    pool.
    """

    store_bytes: int | None = None
    pool_bytes: int | None = None


class SimStore:
    """A prefix-closed set of units, their checkpoints, and a window pool. Times are given in seconds of the trace."""

    def __init__(self, sizes: Sizes, limits: StoreLimits, *, unit_blocks: int, apart: bool = False) -> None:
        """apart: whether this is one of several stores, and keeps records whose parent is in another store."""
        self._apart = apart
        self.sizes = sizes
        self.limits = limits
        self.unit_blocks = unit_blocks
        self.unit_bytes = unit_blocks * sizes.block_bytes
        self.bytes_written = 0
        self.checkpoint_bytes_written = 0
        self.num_checkpoints_written = 0
        self.num_refused = 0
        policy = EvictionPolicy()
        self._disk: Forest[int] = Forest(policy)
        self._pool: Forest[int] = Forest(policy)
        self._expiry: dict[Tier, dict[int, tuple[float, float]]] = {tier: {} for tier in Tier}
        self._due: list[tuple[float, int, Tier]] = []
        self._dead: dict[Tier, set[int]] = {tier: set() for tier in Tier}
        self._swept_s = 0.0
        # Called with blocks that are about to be evicted.
        self.on_evict: Callable[[int], None] = lambda _name: None

    @property
    def bytes_kept(self) -> int:
        """Bytes on disk, without the window pool, which is in memory."""
        return self._disk.nbytes

    def checkpoint_bytes_kept(self, tier: Tier = Tier.DISK) -> int:
        """Bytes of checkpoints in a tier, as of the last call of `expire`."""
        return self.sizes.checkpoint_bytes * len(self._expiry[tier])

    def expire(self, now_s: float) -> None:
        """Make expired checkpoints unusable; `sweep` frees their bytes."""
        while self._due and self._due[0][0] <= now_s:
            _, name, tier = heapq.heappop(self._due)
            until_s = self._expiry[tier].get(name, (0.0, 0.0))[0]
            if until_s > now_s:
                heapq.heappush(self._due, (until_s, name, tier))
            elif self._expiry[tier].pop(name, None):
                self._dead[tier].add(name)

    def has(self, name: int) -> bool:
        return 2 * name in self._disk

    def num_stored(self, names: Names) -> int:
        """How many leading units of the prompt are stored. The set is prefix-closed, so bisection finds the number."""
        low, high = 0, len(names)
        while low < high:
            middle = (low + high + 1) // 2
            if 2 * int(names[middle - 1]) in self._disk:
                low = middle
            else:
                high = middle - 1
        return low

    def last_checkpoint(self, names: Names, num_units: int, now_s: float) -> tuple[int, Tier] | None:
        """The last boundary up to `num_units` with a checkpoint that has not expired, and its tier."""
        tiers = [(tier, table) for tier, table in self._expiry.items() if table]
        if not tiers:
            return None
        for unit in range(num_units, 0, -1):
            name = 2 * int(names[unit - 1]) + 1
            for tier, table in tiers:
                if name in table and table[name][0] > now_s:
                    return unit, tier
        return None

    def touch(self, names: Names, num_units: int, now_s: float) -> None:
        """Record a read of the leading `num_units` units; their ancestors' ranks change when they become leaves."""
        if num_units:
            self._disk.touch(2 * int(names[num_units - 1]), _ms(now_s))

    def touch_checkpoint(self, names: Names, num_units: int, tier: Tier, now_s: float) -> None:
        """Record a use of a checkpoint, which restarts its lifetime."""
        name = 2 * int(names[num_units - 1]) + 1
        _, ttl_s = self._expiry[tier][name]
        self._expiry[tier][name] = (now_s + ttl_s, ttl_s)
        self._forest(tier).touch(name, _ms(now_s))

    def put_units(self, names: Names, first: int, now_s: float, cost_s: float) -> int:
        """Store units [first, end) in order, as far as they fit. Returns how many leading units are stored
        afterwards.
        """
        parent = 2 * int(names[first - 1]) if first else None
        if self._apart and parent is not None and parent not in self._disk:
            parent = None
        for unit in range(first, len(names)):
            name = 2 * int(names[unit])
            if name not in self._disk:
                if not self._make_room(self.unit_bytes, now_s, parent):
                    self.num_refused += len(names) - unit
                    return unit
                self._disk.insert(name, parent=parent, nbytes=self.unit_bytes, now_ms=_ms(now_s), cost_s=cost_s)
                self.bytes_written += self.unit_bytes
            parent = name
        return len(names)

    def put_checkpoint(
        self, names: Names, num_units: int, *, tier: Tier, ttl_s: float, now_s: float, cost_s: float
    ) -> bool:
        """Store a checkpoint after `num_units` units. Returns False if the checkpoint's block is not stored, or the
        checkpoint exists, or it does not fit.
        """
        block = 2 * int(names[num_units - 1])
        name, nbytes = block + 1, self.sizes.checkpoint_bytes
        if block not in self._disk and not self._apart:
            return False
        if name in self._dead[tier]:
            self.sweep(now_s)
        if name in self._expiry[tier]:
            self._expiry[tier][name] = (now_s + ttl_s, ttl_s)
            return False
        if tier is Tier.DISK:
            if not self._make_room(nbytes, now_s, block):
                self.num_refused += 1
                return False
            parent = block if block in self._disk else None
            self._disk.insert(name, parent=parent, nbytes=nbytes, now_ms=_ms(now_s), cost_s=cost_s)
            self.bytes_written += nbytes
        else:
            self._trim_pool(nbytes)
            self._pool.insert(name, parent=None, nbytes=nbytes, now_ms=_ms(now_s), cost_s=cost_s)
        heapq.heappush(self._due, (now_s + ttl_s, name, tier))
        self.checkpoint_bytes_written += nbytes
        self.num_checkpoints_written += 1
        self._expiry[tier][name] = (now_s + ttl_s, ttl_s)
        return True

    def sweep(self, now_s: float) -> None:
        """Free the bytes of checkpoints that have expired."""
        self.expire(now_s)
        self._swept_s = now_s
        for tier, gone in self._dead.items():
            if gone:
                self._take(tier, self.sizes.checkpoint_bytes * len(gone), spare=_all_but(gone))

    def _forest(self, tier: Tier) -> Forest[int]:
        return self._disk if tier is Tier.DISK else self._pool

    def _make_room(self, nbytes: int, now_s: float, kept: int | None) -> bool:
        """Make room for `nbytes` without evicting the block `kept`; returns False if that is not possible."""
        limit = self.limits.store_bytes
        if limit is None or self._disk.nbytes + nbytes <= limit:
            return True
        if now_s >= self._swept_s + _SWEEP_EVERY_S:
            self.sweep(now_s)
        excess = self._disk.nbytes + nbytes - limit
        if excess > 0:
            self._take(Tier.DISK, excess + ahead_bytes(limit), spare=lambda name: name == kept)
        return self._disk.nbytes + nbytes <= limit

    def _trim_pool(self, nbytes: int) -> None:
        limit = self.limits.pool_bytes
        if limit is not None and self._pool.nbytes + nbytes > limit:
            step = self._pool.nbytes + nbytes - limit + int(_POOL_STEP_SHARE * limit)
            self._take(Tier.POOL, step, spare=lambda _: False)

    def _take(self, tier: Tier, nbytes: int, *, spare: Callable[[int], bool]) -> None:
        for name in self._forest(tier).evict(nbytes, keep=spare):
            self._expiry[tier].pop(name, None)
            self._dead[tier].discard(name)
            if tier is Tier.DISK and not name % 2:
                self.on_evict(name // 2)


def _all_but(names: set[int]) -> Callable[[int], bool]:
    only = frozenset(names)
    return lambda name: name not in only


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
