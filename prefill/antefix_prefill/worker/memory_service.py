"""MemoryService: tells routers which blocks a worker has in memory."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import grpc

from antefix import rpc
from antefix.events.block_events import BlockEvent
from antefix.events.event_wire import memory_response
from antefix.events.memory_log import MemoryLog
from antefix.events.numbered_log import Batch, Cursor, watch_log
from antefix.v1 import memory_pb2, memory_pb2_grpc


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """The gRPC calls of one worker."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    async def WatchMemory(
        self, request: memory_pb2.WatchMemoryRequest, context: rpc.Context
    ) -> AsyncIterator[memory_pb2.WatchMemoryResponse]:
        """Events from a cursor on. If the cursor is unknown or too old, a snapshot comes first."""
        cursor = Cursor(epoch=request.epoch, number=request.after)
        async with contextlib.aclosing(watch_log(self._log, cursor, self._snapshot)) as batches:
            async for batch in batches:
                yield memory_response(batch)

    async def _snapshot(self) -> AsyncGenerator[Batch[BlockEvent], None]:
        for piece in self._log.snapshot():
            yield piece


def add_memory_service(log: MemoryLog, server: grpc.aio.Server) -> None:
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(MemoryServicer(log), server)
