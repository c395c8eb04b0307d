"""A window pool in the memory of the store service: bounded and expired there, as handoffs are.

The service keeps records of kind HANDOFF in memory by their hash. A checkpoint goes under a hash derived from its
block's, so that the two never meet.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Sequence

from antefix.block import HASH_BYTES
from antefix.record import Record, RecordKind
from antefix.store.api import Store
from antefix.window_pool.pool_api import NAMES_MAX, Found

# Names asked for in one go after the first, which is the likely one: a turn goes on where the last one ended.
_NAMES_AT_ONCE = 8


class StoreMemoryPool:
    """Over the worker's own store client, which it does not close."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, record: Record) -> bool:
        kept = dataclasses.replace(record, kind=RecordKind.HANDOFF, hash=pool_name(record.hash))
        return not (await self._store.put([kept])).refused

    async def nearest(self, names: Sequence[bytes], *, fingerprint: bytes) -> Found | None:
        first, step = 0, 1
        while first < min(len(names), NAMES_MAX):
            part = names[first : first + step]
            payloads = await asyncio.gather(
                *(self._store.get(RecordKind.HANDOFF, pool_name(name), fingerprint=fingerprint) for name in part)
            )
            for index, payload in enumerate(payloads, start=first):
                if payload is not None:
                    return Found(index=index, payload=payload)
            first, step = first + step, _NAMES_AT_ONCE
        return None

    async def close(self) -> None:
        pass


def pool_name(block_hash: bytes) -> bytes:
    """The name in the service's memory of the checkpoint after that block."""
    return hashlib.blake2b(block_hash, digest_size=HASH_BYTES, person=b"antefix-pool-win").digest()
