"""Several embedded stores behind one `ManyStores`, each in a wrapper that a test can make fail as real stores do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from antefix.errors import Unavailable
from antefix.record import Held, Record, RecordKind
from antefix.store.local_copies import LocalCopies
from antefix.store.many_stores import ManyStores
from antefix.store.store_members import Member
from antefix.store.tier import Tier
from antefix.tier_kind import TierKind
from antefix_kvstore.embedded_store import EmbeddedStore
from antefix_kvstore.kvstore_config import KvStoreConfig
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt, owner

PROMPT = Prompt(list(range(BLOCK * 40)))
OWNER = owner("")


class FaultyStore:
    """An embedded store that counts its reads.  dead: refuses all calls.  dies_after: blocks that it gives before it
    dies.

    hangs: reads never end.  slow_s: delay before each read.  says_s: delay before it says what it holds.
    lost: blocks that it claims to hold but does not.
    """

    def __init__(self, store: EmbeddedStore) -> None:
        self.store = store
        self.dead = False
        self.dies_after: int | None = None
        self.hangs = False
        self.slow_s = 0.0
        self.says_s = 0.0
        self.num_read = 0
        self.num_hung = 0
        self.num_asked = 0
        self.lost: set[bytes] = set()

    def __getattr__(self, name: str) -> Any:
        if self.dead and name not in ("close", "engine"):
            raise Unavailable("this store is dead")
        return getattr(self.store, name)

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        self.num_asked += 1
        if self.dead:
            raise Unavailable("this store is dead")
        if self.says_s:
            await asyncio.sleep(self.says_s)
        return await self.store.held(chain, fingerprint=fingerprint)

    # Defined here, because `isinstance(..., RecordSource)` does not use `__getattr__` from Python 3.12 on.
    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        if self.dead:
            raise Unavailable("this store is dead")
        return await self.store.get_records(kind, hashes, fingerprint=fingerprint, tenant=tenant)

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        if self.dead:
            raise Unavailable("this store is dead")
        if self.hangs:
            self.num_hung += 1
            await asyncio.sleep(3600)
        if self.slow_s:
            await asyncio.sleep(self.slow_s)
        for number, name in enumerate(hashes):
            if name in self.lost:
                return number
            if self.dies_after is not None and self.dies_after <= 0:
                # As after a broken stream, the next buffer has only a part of its bytes.
                into[number][: len(into[number]) // 2] = b"\xff" * (len(into[number]) // 2)
                self.dead = True
                raise Unavailable("this store died in mid-stream")
            if await self.store.get_blocks([name], into[number : number + 1], fingerprint=fingerprint) == 0:
                return number
            self.num_read += 1
            if self.dies_after is not None:
                self.dies_after -= 1
            await asyncio.sleep(0)
        return len(hashes)


class Rack:
    """Stores by name. The first one is on this host."""

    def __init__(self, stores: dict[str, FaultyStore], copies: LocalCopies | None = None, num_near: int = 1) -> None:
        self.stores = stores
        self.members = [
            Member(
                tier=Tier(name, TierKind.DISK if number < num_near else TierKind.PEER, store),
                store=store,  # type: ignore[arg-type]
                near=number < num_near,
            )
            for number, (name, store) in enumerate(stores.items())
        ]
        self.many = ManyStores(self.members, copies=copies)

    async def fill(self, name: str, start: int, stop: int, checkpoints: Sequence[int] = ()) -> None:
        records = [PROMPT.block(index, parent_elsewhere=True) for index in range(start, stop)]
        records += [PROMPT.checkpoint(index, parent_elsewhere=True) for index in checkpoints]
        assert not (await self.stores[name].store.put(records)).refused

    async def num_stored(self) -> int:
        return (await self.many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks

    async def num_restored(self) -> int:
        """The number of leading blocks that are restored. Every byte of them must be right."""
        into = PROMPT.buffers()
        num_good = await self.many.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT, tenant=OWNER)
        assert [bytes(b) for b in into[:num_good]] == [PROMPT.payload(i) for i in range(num_good)]
        return num_good

    def held_here(self, name: str) -> tuple[tuple[int, int], ...]:
        return self.stores[name].store.engine.held(PROMPT.hashes, fingerprint=FINGERPRINT).spans


@asynccontextmanager
async def rack_of(
    directory: Path, names: str = "abc", copies: LocalCopies | None = None, num_near: int = 1
) -> AsyncIterator[Rack]:
    stores = {}
    for name in names:
        config = KvStoreConfig(dir=str(directory / name), budget_bytes=8 << 20, scrub_bytes_per_s=0, durable=False)
        stores[name] = FaultyStore(EmbeddedStore(config))
        stores[name].engine.register(FINGERPRINT, BLOCK, {})
    rack = Rack(stores, copies, num_near)
    try:
        yield rack
    finally:
        await rack.many.close()
