"""Workers' memory events on the wire: protobuf and Redis stop here.

antefix:memory:{<shard>}     a stream in Redis; a worker's shard follows from its address, so its entries are in order
    a  address of the worker      e  epoch      n  number of the event      k  kind, 0 alive
    b  8 bytes of each block hash, one after the other
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Mapping
from typing import Final

import grpc

from antefix.errors import InvalidRequest
from antefix.events.block_events import KEY_BYTES, EventKind, MemoryEvent
from antefix.events.event_wire import batches_of, response_of
from antefix.events.numbered_log import Batch, Cursor
from antefix.events.stream_format import Fields, StreamFormat, known_kind
from antefix.v1 import memory_pb2, memory_pb2_grpc

# An entry is at most 8 KiB: a shard's stream takes 32 MiB at most.
NUM_SHARDS: Final = 8
STREAMS: Final = tuple(f"antefix:memory:{{{shard}}}" for shard in range(NUM_SHARDS))


def watch_memory(channel: grpc.aio.Channel, cursor: Cursor | None = None) -> AsyncGenerator[Batch[MemoryEvent], None]:
    """What a worker says of its memory, until the stream breaks.

    Raises:  Unavailable: the worker went away.
    """
    start = cursor or Cursor()
    request = memory_pb2.WatchMemoryRequest(epoch=start.epoch, after=start.number)
    return batches_of(lambda: memory_pb2_grpc.MemoryServiceStub(channel).WatchMemory(request), _from_wire)


def memory_response(batch: Batch[MemoryEvent]) -> memory_pb2.WatchMemoryResponse:
    return response_of(batch, memory_pb2.WatchMemoryResponse, _to_wire)


def stream_of(address: str) -> str:
    """The same in every process."""
    return STREAMS[hashlib.blake2b(address.encode(), digest_size=1).digest()[0] % NUM_SHARDS]


def _to_wire(event: MemoryEvent) -> memory_pb2.MemoryEvent:
    return memory_pb2.MemoryEvent(kind=event.kind.value, keys=event.keys)  # type: ignore[arg-type]


def _from_wire(event: memory_pb2.MemoryEvent) -> MemoryEvent:
    if len(event.keys) % KEY_BYTES:
        raise InvalidRequest(f"{len(event.keys)} bytes are not a whole number of {KEY_BYTES}-byte keys")
    return MemoryEvent(kind=EventKind(event.kind), keys=event.keys)


def _pack(event: MemoryEvent) -> Fields:
    return {"k": int(event.kind), "b": event.keys}


def _unpack(fields: Mapping[bytes, bytes]) -> MemoryEvent:
    if len(fields[b"b"]) % KEY_BYTES:
        raise ValueError("not whole keys")
    return MemoryEvent(kind=known_kind(fields), keys=fields[b"b"])


MEMORY_STREAM: Final = StreamFormat(stream_of=stream_of, pack=_pack, unpack=_unpack)
