"""What lies before clients' cache breakpoints: its records are pinned in the store for their time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from antefix import rpc
from antefix.block import Chain
from antefix.errors import AntefixError
from antefix.v1 import kvstore_pb2, kvstore_pb2_grpc

log = logging.getLogger("antefix.router")

PIN_TIMEOUT_S = 5.0


class BreakpointPins:
    """Pins beside the requests: a pin that fails costs a later hit, never an answer."""

    def __init__(self, store_address: str) -> None:
        self._channel = rpc.channel(store_address)
        self._stub = kvstore_pb2_grpc.KvStoreServiceStub(self._channel)
        self._tasks: set[asyncio.Task[None]] = set()

    def pin(self, chain: Chain, breakpoints: Sequence[tuple[int, float]], *, owner: bytes) -> None:
        """Pin the last whole block before each breakpoint, which keeps all before it, and its checkpoint.

        breakpoints: (number of tokens, seconds).  owner: whose records they are.
        """
        for num_tokens, ttl_s in breakpoints:
            num_blocks = num_tokens // chain.block_size
            if num_blocks:
                task = asyncio.create_task(self._pin(chain.hashes[num_blocks - 1], ttl_s, owner))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    async def _pin(self, block_hash: bytes, ttl_s: float, owner: bytes) -> None:
        kinds = (kvstore_pb2.RECORD_KIND_BLOCK, kvstore_pb2.RECORD_KIND_CHECKPOINT)
        records = [kvstore_pb2.RecordName(kind=kind, hash=block_hash) for kind in kinds]
        request = kvstore_pb2.PinRequest(records=records, duration_s=ttl_s, owner=owner)
        try:
            with rpc.rpc_errors():
                await self._stub.Pin(request, timeout=PIN_TIMEOUT_S)
        except AntefixError as err:
            log.warning("a cache breakpoint could not be pinned: %s", err)
