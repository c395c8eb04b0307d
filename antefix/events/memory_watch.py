"""Following a worker's memory over a direct stream: what is there now, then every change, without gaps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from antefix import rpc
from antefix.events.memory_log import MemoryBatch, MemoryEvent, MemoryEventKind
from antefix.v1 import memory_pb2, memory_pb2_grpc

# A snapshot of a million blocks is 8 MB; a worker that takes longer than this for it is asked again.
SNAPSHOT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCursor:
    """Where a watcher stands; the empty one asks for a snapshot."""

    epoch: bytes = b""
    number: int = 0


async def watch_memory(
    channel: grpc.aio.Channel, cursor: MemoryCursor | None = None, *, snapshot_only: bool = False
) -> AsyncIterator[MemoryBatch]:
    """Yield batches until the stream breaks, or the snapshot's only.

    Raises:  Unavailable: the worker went away; call again with the last cursor.
    """
    start = cursor or MemoryCursor()
    request = memory_pb2.WatchMemoryRequest(epoch=start.epoch, after=start.number, snapshot_only=snapshot_only)
    call = memory_pb2_grpc.MemoryServiceStub(channel).WatchMemory(
        request, timeout=SNAPSHOT_TIMEOUT_S if snapshot_only else None
    )
    in_snapshot = False
    try:
        with rpc.rpc_errors():
            async for response in call:
                begins = response.snapshot and not in_snapshot
                in_snapshot = response.snapshot and not response.snapshot_end
                yield _batch(response, begins=begins)
    finally:
        call.cancel()


def _batch(response: memory_pb2.WatchMemoryResponse, *, begins: bool) -> MemoryBatch:
    first = response.number - len(response.events) + 1
    return MemoryBatch(
        epoch=response.epoch,
        number=response.number,
        events=tuple(
            MemoryEvent(
                number=response.number if response.snapshot else first + index,
                kind=MemoryEventKind(event.kind),
                keys=event.keys,
            )
            for index, event in enumerate(response.events)
        ),
        snapshot=response.snapshot,
        snapshot_begins=begins,
        snapshot_ends=response.snapshot_end,
    )
