"""A window pool in the memory of the store service, which bounds the memory and expires checkpoints, as it does with
handoffs.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from antefix.record import Record, RecordKind
from antefix.store.api import Store
from antefix.window_pool.pool_api import NAMES_MAX, Found

# Names asked for in one go after the first, which is the likely one: a turn continues where the last one ended.
_NAMES_AT_ONCE = 8


class StoreMemoryPool:
    """A window pool that is reached through the worker's client of the store. This pool does not close the client."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, record: Record) -> bool:
        # It keeps its seal, and goes to disk with it where the pool has no room.
        kept = dataclasses.replace(record, kind=RecordKind.POOLED)
        return not (await self._store.put([kept])).refused

    async def nearest(self, names: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Found | None:
        first, step = 0, 1
        while first < min(len(names), NAMES_MAX):
            part = names[first : first + step]
            payloads = await asyncio.gather(
                *(self._store.get(RecordKind.POOLED, name, fingerprint=fingerprint, tenant=tenant) for name in part)
            )
            for index, payload in enumerate(payloads, start=first):
                if payload is not None:
                    return Found(index=index, payload=payload)
            first, step = first + step, _NAMES_AT_ONCE
        return None

    async def close(self) -> None:
        pass
