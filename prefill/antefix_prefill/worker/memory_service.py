"""MemoryService: a worker's memory, told to routers that ask. Protobuf stops here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc

from antefix import rpc
from antefix.events import MemoryEvent, MemoryLog
from antefix.v1 import memory_pb2, memory_pb2_grpc

# Events in one message; more are sent in the next.
_EVENTS_MAX = 256


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """One worker's calls."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    async def WatchMemory(
        self, request: memory_pb2.WatchMemoryRequest, context: rpc.Context
    ) -> AsyncIterator[memory_pb2.WatchMemoryResponse]:
        """Events from a cursor, a snapshot before them where the cursor is unknown or too old."""
        log, changed = self._log, asyncio.Event()
        epoch, number = request.epoch, request.after
        unlisten = log.listen(changed.set)
        try:
            while True:
                changed.clear()
                found = None if request.snapshot_only else log.since(epoch, number)
                if found is None:
                    for piece in log.snapshot():
                        epoch, number = piece.epoch, piece.number
                        yield _response(epoch, number, piece.events, snapshot=True, snapshot_end=piece.snapshot_ends)
                    if request.snapshot_only:
                        return
                elif found:
                    part = found[:_EVENTS_MAX]
                    number = part[-1].number
                    yield _response(epoch, number, part)
                else:
                    await changed.wait()
        finally:
            unlisten()


def add_memory_service(log: MemoryLog, server: grpc.aio.Server) -> None:
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(MemoryServicer(log), server)


def _response(
    epoch: bytes, number: int, events: Sequence[MemoryEvent], *, snapshot: bool = False, snapshot_end: bool = False
) -> memory_pb2.WatchMemoryResponse:
    return memory_pb2.WatchMemoryResponse(
        epoch=epoch,
        number=number,
        snapshot=snapshot,
        snapshot_end=snapshot_end,
        events=[
            memory_pb2.MemoryEvent(kind=event.kind.value, keys=event.keys)  # type: ignore[arg-type]
            for event in events
        ],
    )
