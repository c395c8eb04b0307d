"""The faults of a history: one at a time; the seed draws each fault's time and kind."""

from __future__ import annotations

import asyncio
import random
import shutil
from typing import TYPE_CHECKING

from antefix.record import RecordKind

if TYPE_CHECKING:
    from tests.histories.world import World

KINDS = (
    "partition",
    "hang",
    "loss",
    "delay",
    "worker dies",
    "handoffs lost",
    "store loses power",
    "bit rot",
    "index harmed",
    "evict",
    "clock step",
    "router dies",
)


class Faults:
    """The faults of one world. Records that a fault damages are no longer promised to be in the store."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.rng = rng

    async def happen(self, at_s: float) -> None:
        await asyncio.sleep(at_s)
        kind = self.rng.choice(KINDS)
        self.world.counts["faults"] += 1
        self.world.counts[f"fault: {kind}"] += 1
        await getattr(self, "_" + kind.replace(" ", "_"))()
        self.world.over.append((kind, self.world.loop.now_s))

    def _peer(self) -> str:
        return self.rng.choice(["store", *self.world.workers])

    async def _partition(self) -> None:
        peer = self._peer()
        self.world.network.cut.add(peer)
        await asyncio.sleep(self.rng.uniform(0.05, 3.0))
        self.world.network.cut.discard(peer)

    async def _hang(self) -> None:
        peer = self._peer()
        self.world.network.hanging.add(peer)
        await asyncio.sleep(self.rng.uniform(0.05, 5.0))
        self.world.network.hanging.discard(peer)

    async def _loss(self) -> None:
        self.world.network.loss = self.rng.uniform(0.02, 0.3)
        await asyncio.sleep(self.rng.uniform(0.1, 2.0))
        self.world.network.loss = 0.0

    async def _delay(self) -> None:
        self.world.network.delay_s = self.rng.uniform(0.01, 0.3)
        await asyncio.sleep(self.rng.uniform(0.1, 2.0))
        self.world.network.delay_s = 0.002

    async def _worker_dies(self) -> None:
        worker = self.world.workers[self.rng.choice(sorted(self.world.workers))]
        worker.die()
        await asyncio.sleep(self.rng.choice([0.3, 2.0, 8.0]) * self.rng.random())
        worker.start_again()

    async def _handoffs_lost(self) -> None:
        self.world.handoffs.clear()

    async def _store_loses_power(self) -> None:
        """Synced data survive; data that were not synced may survive, be torn, or be lost."""
        if self.world.store.engine is None:
            return
        self.world.store.engine.abandon()
        self.world.store.engine = None
        self.world.store_gone.set()
        self.world.handoffs.clear()
        self.world.disk.lose_power(self.rng)
        if self.rng.random() < 0.3:
            shutil.rmtree(self.world.directory / "store" / "index", ignore_errors=True)
        await asyncio.sleep(self.rng.uniform(0.05, 1.0))
        self.world.open_store()

    async def _bit_rot(self) -> None:
        segments = sorted((self.world.directory / "store" / "segments").glob("*.seg"))
        if not segments:
            return
        path = self.rng.choice(segments)
        data = bytearray(path.read_bytes())
        if len(data) > 4096:
            at = self.rng.randrange(4096, len(data))
            data[at] ^= 1 << self.rng.randrange(8)
            with path.open("r+b") as file:
                file.seek(at)
                file.write(data[at : at + 1])
            self._give_up(int(path.stem), at)

    def _give_up(self, segment: int, at: int) -> None:
        """The record with this byte is no longer promised, nor the records that depend on it, because a rebuilt index
        has no orphans."""
        if self.world.store.engine is None:
            self.world.may_lose_store = True
            return
        store = self.world.store
        with store.engine.index.txn() as txn:
            for block_hash in store.parents:
                entry = store.engine.index.entry(txn, RecordKind.BLOCK, block_hash)
                if entry and entry.segment == segment and entry.offset <= at < entry.offset + entry.extent_bytes:
                    store.rotten.add(block_hash)

    async def _index_harmed(self) -> None:
        if self.world.store.engine is not None:
            shutil.rmtree(self.world.directory / "store" / "index", ignore_errors=True)
            self.world.store.engine.maintain()

    async def _evict(self) -> None:
        if self.world.store.engine is not None and self.world.store.acknowledged:
            chosen = self.rng.choice(sorted(self.world.store.acknowledged))
            self.world.store.engine.evict([(RecordKind.BLOCK, chosen)])
            self.world.store.acknowledged -= self.world.store.with_descendants({chosen})

    async def _clock_step(self) -> None:
        step_s = self.rng.choice([-400 * 86400.0, -5.0, 3.0, 400 * 86400.0])
        self.world.loop.wall_step_s += step_s
        self.world.may_lose_store |= 0 < self.world.ttl_s < step_s

    async def _router_dies(self) -> None:
        """The router dies. Its ledger stays, perhaps with a torn end, and the next router closes running requests."""
        if not self.world.router_is_up:
            return
        self.world.router_is_up = False
        old = self.world.accounts
        old.ledger.close()
        for asking in list(self.world.asking):
            asking.cancel()
        last = sorted((self.world.directory / "ledger").glob("usage-*.ledger"))[-1]
        if self.rng.random() < 0.5:
            with last.open("ab") as file:
                file.write(self.rng.randbytes(self.rng.randint(1, 300)))
        if self.rng.random() < 0.3:
            shutil.rmtree(self.world.directory / "ledger" / "index")
        await asyncio.sleep(self.rng.uniform(0.01, 0.5))
        self.world.open_router()
