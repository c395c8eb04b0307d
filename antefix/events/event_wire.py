"""Converts events from and to the protobuf messages of gRPC streams, for workers and for stores."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

from antefix import rpc
from antefix.block import HASH_BYTES
from antefix.errors import InvalidRequest
from antefix.events.block_events import BlockEvent, EventKind
from antefix.events.numbered_log import Batch, Cursor
from antefix.request_limits import answered
from antefix.v1 import kvstore_pb2, memory_pb2, memory_pb2_grpc


def watch_memory(channel: grpc.aio.Channel, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
    """The events of a worker's memory, until the stream breaks.

    Raises:  Unavailable: the stream broke; watch again from the last cursor.
    """
    start = cursor or Cursor()
    request = memory_pb2.WatchMemoryRequest(epoch=start.epoch, after=start.number)
    return _batches(lambda: memory_pb2_grpc.MemoryServiceStub(channel).WatchMemory(request), _of_memory)


def watch_store(stub: Any, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
    """The events of a store's records, until the stream breaks; works like `watch_memory`."""
    start = cursor or Cursor()
    request = kvstore_pb2.WatchRequest(epoch=start.epoch, after=start.number)
    return _batches(lambda: stub.Watch(request), _of_store)


def memory_response(batch: Batch[BlockEvent]) -> memory_pb2.WatchMemoryResponse:
    response = memory_pb2.WatchMemoryResponse(**_fields(batch))
    for event in batch.events:
        response.events.add(kind=event.kind.value, keys=event.hashes)
    return response


def store_response(batch: Batch[BlockEvent]) -> kvstore_pb2.WatchResponse:
    response = kvstore_pb2.WatchResponse(**_fields(batch))
    for event in batch.events:
        response.events.add(kind=event.kind.value, hashes=event.hashes, fingerprint=event.fingerprint)
    return response


def _fields(batch: Batch[BlockEvent]) -> dict[str, Any]:
    return {
        "epoch": batch.cursor.epoch,
        "number": batch.cursor.number,
        "snapshot": batch.snapshot,
        "snapshot_end": batch.snapshot_ends,
    }


async def _batches(
    start: Callable[[], Any], event_of: Callable[[Any], BlockEvent]
) -> AsyncGenerator[Batch[BlockEvent], None]:
    """The batches of a call. The gRPC call starts when the first batch is requested, and is cancelled when the
    generator is closed.
    """
    call, in_snapshot = start(), False
    try:
        with rpc.rpc_errors():
            async for response in call:
                answered(response)
                begins = response.snapshot and not in_snapshot
                in_snapshot = response.snapshot and not response.snapshot_end
                yield Batch(
                    cursor=Cursor(epoch=response.epoch, number=response.number),
                    events=tuple(_whole(event_of(event)) for event in response.events),
                    snapshot=response.snapshot,
                    snapshot_begins=begins,
                    snapshot_ends=response.snapshot_end,
                )
    finally:
        call.cancel()


def _of_memory(event: memory_pb2.MemoryEvent) -> BlockEvent:
    return BlockEvent(kind=EventKind(event.kind), hashes=event.keys)


def _of_store(event: kvstore_pb2.StoreEvent) -> BlockEvent:
    return BlockEvent(
        kind=EventKind(event.kind), hashes=event.hashes, hash_bytes=HASH_BYTES, fingerprint=event.fingerprint
    )


def _whole(event: BlockEvent) -> BlockEvent:
    if not event.is_whole:
        raise InvalidRequest(
            f"the hashes of a message have {len(event.hashes)} bytes, which is not a whole number of "
            f"{event.hash_bytes}-byte hashes"
        )
    return event
