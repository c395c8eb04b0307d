"""Several simulated stores of one fleet, with the object tier behind them: each worker writes to its host's store and
reads from any, as `antefix.store` does.

KV that a worker computes after a prefix from another host's store is stored apart. Blocks that a host reads NUM_READS
times from other stores are copied to its own store, up to a limit in bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from antefix.window import Sizes, Tier
from antefix_simulate.simulated_objects import SimObjects
from antefix_simulate.simulated_store import SimStore, StoreLimits
from antefix_simulate.trace import Names

DISK, PEER, OBJECT = "disk", "peer", "object"
# The value in `antefix.store.local_copies`, which this package does not import.
NUM_READS: Final = 3


class ManySimStores:
    """limits: of each store. copies_bytes: limit on copies per store.  object_bytes: size of the object tier; 0: none.
    num_processes: number of processes that use the object tier.
    """

    def __init__(
        self,
        sizes: Sizes,
        limits: StoreLimits,
        *,
        unit_blocks: int,
        num_stores: int,
        copies_bytes: int,
        object_bytes: int = 0,
        num_processes: int = 0,
    ) -> None:
        self.stores = [SimStore(sizes, limits, unit_blocks=unit_blocks, apart=True) for _ in range(num_stores)]
        self.bytes_by_tier: Counter[str] = Counter()
        self.bytes_copied = 0
        self.unit_blocks = unit_blocks
        self._unit_bytes = unit_blocks * sizes.block_bytes
        self._reads: Counter[tuple[int, int]] = Counter()
        self._room = [copies_bytes] * num_stores
        self.objects = SimObjects(object_bytes, self._unit_bytes, num_processes=num_processes)
        if object_bytes:
            for store in self.stores:
                store.on_evict = self.objects.upload

    def of(self, worker: int) -> HostStore:
        """The stores as the worker's host sees them; workers are assigned to hosts in turn."""
        return HostStore(self, self.home_of(worker))

    def home_of(self, worker: int) -> int:
        return worker % len(self.stores)

    def places(self, names: Sequence[int]) -> tuple[tuple[int, frozenset[str]], ...]:
        """Runs of units that the same stores have: the number of units, and the names of the stores."""
        holders = (self._holders(name) for name in names)
        return tuple((sum(1 for _ in run), held) for held, run in groupby(holders))

    def _holders(self, name: int) -> frozenset[str]:
        found = [store_name(number) for number, store in enumerate(self.stores) if store.has(name)]
        return frozenset([*found, OBJECT] if name in self.objects else found)


def store_name(number: int) -> str:
    """The store's name in placement."""
    return f"store-{number}"


class HostStore:
    """The stores as one host sees them: the same calls as `SimStore` has, and in addition which tier has which part."""

    def __init__(self, many: ManySimStores, home: int) -> None:
        self._many = many
        self._home = home
        self._own = many.stores[home]

    def expire(self, now_s: float) -> None:
        self._many.objects.now_s = now_s
        for store in self._many.stores:
            store.expire(now_s)

    def checkpoint_bytes_kept(self) -> int:
        return self._own.checkpoint_bytes_kept()

    def num_stored(self, names: Names) -> int:
        """How many leading units are in at least one store."""
        return next((unit for unit in range(len(names)) if not self._has(names, unit)), len(names))

    def tiers(self, names: Names, num_units: int) -> tuple[tuple[int, str], ...]:
        """Which tier has each part of the leading `num_units` units: (number of blocks at its end, tier)."""
        labels = [self._tier_of(int(names[unit])) for unit in range(num_units)]
        ends = [end for end in range(1, num_units + 1) if end == num_units or labels[end - 1] != labels[end]]
        return tuple((end * self._many.unit_blocks, labels[end - 1]) for end in ends)

    def last_checkpoint(self, names: Names, num_units: int, now_s: float) -> tuple[int, Tier] | None:
        """The last checkpoint in any store; if several stores have it, the one in this host's store is chosen."""
        found = [store.last_checkpoint(names, num_units, now_s) for store in self._in_order()]
        return max((each for each in found if each is not None), key=lambda each: each[0], default=None)

    def touch(self, names: Names, num_units: int, now_s: float) -> None:
        """Record a use, in each store, of the last unit that was read there."""
        for store in self._many.stores:
            last = next((unit for unit in range(num_units, 0, -1) if store.has(int(names[unit - 1]))), 0)
            if last:
                store.touch(names, last, now_s)

    def note_read(self, names: Names, first: int, stop: int, now_s: float) -> None:
        """Record that units [first, stop) were loaded: bytes are counted by tier, and units that are often read from
        elsewhere are copied.
        """
        many = self._many
        many.objects.now_s = now_s
        tiers = {unit: self._tier_of(int(names[unit])) for unit in range(first, stop)}
        for tier, run in groupby(tiers.values()):
            if tier == OBJECT:
                many.objects.read(sum(1 for _ in run))
        for unit, tier in tiers.items():
            name = int(names[unit])
            many.bytes_by_tier[tier] += many._unit_bytes
            many.objects.upload(name)
            if tier == DISK:
                continue
            many._reads[self._home, name] += 1
            if many._reads[self._home, name] >= NUM_READS and many._room[self._home] >= many._unit_bytes:
                many._room[self._home] -= many._unit_bytes
                many.bytes_copied += many._unit_bytes
                self._own.put_units(names[: unit + 1], unit, now_s, 0.0)

    def put_units(self, names: Names, first: int, now_s: float, cost_s: float) -> int:
        return self._own.put_units(names, first, now_s, cost_s)

    def put_checkpoint(
        self, names: Names, num_units: int, *, tier: Tier, ttl_s: float, now_s: float, cost_s: float
    ) -> bool:
        return self._own.put_checkpoint(names, num_units, tier=tier, ttl_s=ttl_s, now_s=now_s, cost_s=cost_s)

    def _has(self, names: Names, unit: int) -> bool:
        name = int(names[unit])
        return any(store.has(name) for store in self._in_order()) or name in self._many.objects

    def _tier_of(self, name: int) -> str:
        """The nearest tier that has this unit."""
        if self._own.has(name):
            return DISK
        return PEER if any(store.has(name) for store in self._many.stores) else OBJECT

    def _in_order(self) -> list[SimStore]:
        stores = self._many.stores
        return [*stores[self._home :], *stores[: self._home]]
