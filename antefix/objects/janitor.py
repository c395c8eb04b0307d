"""Enforces the object tier's budget, quotas and times to live, and writes its index. Any number of hosts may run the
janitor of an object store.

Hosts need no coordination, because all make the same decisions: they delete expired segments and the oldest ones, and a
tile of the index follows from the segments of its period. Readers need no notice (docs/OBJECT_STORE.md).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from antefix.objects.catalog import Catalog
from antefix.objects.object_index import pack_run
from antefix.objects.segment_object import SegmentRef
from antefix.objects.tiles import INDEX, LEVEL_MAX, Tile, largest

# Delete down to this share of the limit, so that not every pass has to delete something.
_KEPT_SHARE: Final = 0.95
# A store service writes a tile above level 0 up to this share of the tile's period late, drawn per tile. Otherwise
# hundreds of hosts would write the same large tile at once (docs/results/tiers.md).
SPREAD_SHARE: Final = 0.25
_TURNS_MAX: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectLimits:
    """Limits in bytes of segments; 0: no limit. quotas: limits of single tenants, by tenant digest, in place of
    `tenant_bytes`.
    """

    budget_bytes: int = 0
    tenant_bytes: int = 0
    quotas: Mapping[bytes, int] = field(default_factory=dict)

    def of_tenant(self, tenant: bytes) -> int:
        return self.quotas.get(tenant, self.tenant_bytes)


@dataclass(slots=True)
class JanitorCounters:
    """Counts deleted segments, by reason, and written tiles."""

    num_expired: int = 0
    num_over_budget: int = 0
    num_over_quota: int = 0
    num_drafts: int = 0
    num_tiles: int = 0


class Janitor:
    def __init__(self, catalog: Catalog, limits: ObjectLimits, *, spread_share: float = 0.0) -> None:
        """spread_share: of a tile's period, by which its writing is delayed at most, as `SPREAD_SHARE`."""
        self.counters: Final = JanitorCounters()
        self._spread_share = spread_share
        # When this host writes a tile that is due, if no other host has by then.
        self._turns_ms: dict[Tile, float] = {}
        self._catalog = catalog
        self._limits = limits

    async def tidy(self) -> None:
        """Run one clean-up. Raises: Unavailable: the bucket does not answer; the next clean-up deletes the remaining
        segments.
        """
        await self._catalog.refresh()
        self.counters.num_expired += await self.delete(self._catalog.expired())
        self.counters.num_over_quota += await self.delete(self._over_quota())
        self.counters.num_over_budget += await self.delete(self._over_budget())
        await self.write_tiles()
        self.counters.num_drafts += await self._catalog.bucket.clean()

    async def delete(self, refs: Iterable[SegmentRef]) -> int:
        """Delete segments, even while they are being read: readers notice that a segment is gone. Returns how many."""
        gone = list(refs)
        if gone:
            await self._catalog.bucket.delete([ref.name for ref in gone])
        for ref in gone:
            self._catalog.lose(ref.id)
        return len(gone)

    def _over_budget(self) -> list[SegmentRef]:
        # A list of all segments takes seconds where there are a million, so it is made only when it is needed.
        if not self._limits.budget_bytes or self._catalog.live_bytes() <= self._limits.budget_bytes:
            return []
        return _oldest(self._catalog.segments(), self._limits.budget_bytes)

    def _over_quota(self) -> list[SegmentRef]:
        if not self._limits.tenant_bytes and not any(self._limits.quotas.values()):
            return []
        by_tenant: dict[bytes, list[SegmentRef]] = {}
        for ref in self._catalog.segments():
            by_tenant.setdefault(ref.tenant, []).append(ref)
        return [ref for tenant, refs in by_tenant.items() for ref in _oldest(refs, self._limits.of_tenant(tenant))]

    async def write_tiles(self) -> None:
        """Write the tiles of the index that are due and missing, and delete the tiles that a larger tile covers."""
        catalog, now_ms = self._catalog, self._catalog.clock_ms()
        listed = await catalog.bucket.list_objects(INDEX)
        there = {tile for each in listed if (tile := Tile.of_name(each.name)) is not None}
        before = frozenset(there)
        covering = largest(there)
        living = catalog.tiles()
        for tile in living:
            if tile.due(now_ms) and not any(each.covers(tile.start_ms) for each in covering):
                await self._write(tile)
                there.add(tile)
        for level in range(LEVEL_MAX):
            for above in sorted({tile.above for tile in there if tile.level == level} - there):
                if above.due(now_ms) and _lives(above, living) and self._is_turn(above, now_ms):
                    await self._write(above)
                    there.add(above)
        # Delete a tile only if the larger tile existed before this pass, so that every reader finds one of the two.
        kept = set(largest(before))
        empty = {tile for tile in kept if not _lives(tile, living)}
        await catalog.bucket.delete([tile.name for tile in sorted((before - kept) | empty)])

    def _is_turn(self, tile: Tile, now_ms: int) -> bool:
        """Whether the delay that was drawn for this tile has passed."""
        if tile not in self._turns_ms:
            if len(self._turns_ms) >= _TURNS_MAX:
                self._turns_ms.clear()
            self._turns_ms[tile] = now_ms + self._spread_share * tile.width_ms * random.random()
        return now_ms >= self._turns_ms[tile]

    async def _write(self, tile: Tile) -> None:
        catalog = self._catalog
        await catalog.take_in(tile)
        run = await asyncio.to_thread(catalog.take_out, lambda ref: tile.covers(ref.created_ms))
        await catalog.bucket.put(tile.name, await asyncio.to_thread(pack_run, run))
        self.counters.num_tiles += 1


def _oldest(refs: Sequence[SegmentRef], bytes_max: int) -> list[SegmentRef]:
    """The segments to delete, so that the remaining ones take at most `bytes_max`; 0: no limit. refs: all segments, the
    oldest first.
    """
    excess = sum(ref.nbytes for ref in refs) - bytes_max
    if not bytes_max or excess <= 0:
        return []
    excess += round(bytes_max * (1 - _KEPT_SHARE))
    gone = []
    for ref in refs:
        if excess <= 0:
            break
        gone.append(ref)
        excess -= ref.nbytes
    return gone


def _lives(tile: Tile, living: Iterable[Tile]) -> bool:
    return any(tile.covers(each.start_ms) for each in living)
