"""Workers' memory events through Redis Streams: each worker tells once, however many routers there are.

    antefix:memory:{<shard>}     a stream; a worker's shard follows from its address, and its entries are in order
        a  address of the worker      e  epoch      n  number of the event      k  kind: 1 stored, 2 evicted, 0 alive
        b  8 bytes of each block hash, one after the other

How streams are told and read, and what happens when Redis is away, is `redis_stream`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from antefix.events.memory_log import KEY_BYTES, MemoryBatch, MemoryEvent, MemoryEventKind, MemoryLog
from antefix.events.redis_stream import ALIVE, Fields, StreamPublisher, StreamReader

# An entry is at most 8 KiB: a shard's stream takes 32 MiB at most.
NUM_SHARDS: Final = 8


def shard_of(address: str) -> int:
    """The same in every process."""
    return hashlib.blake2b(address.encode(), digest_size=1).digest()[0] % NUM_SHARDS


def stream_of(shard: int) -> str:
    return f"antefix:memory:{{{shard}}}"


class MemoryPublisher(StreamPublisher[MemoryEvent]):
    """`async with`: tells Redis what a worker's log says."""

    def __init__(self, url: str, memory: MemoryLog, address: str) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""

        def fields_of(event: MemoryEvent | None) -> Fields:
            if event is None:
                return {"a": address, "k": ALIVE, "b": b""}
            return {"a": address, "k": int(event.kind), "b": event.keys}

        super().__init__(url, memory, stream_of(shard_of(address)), fields_of)


class MemoryReader(StreamReader):
    """Reads all shards and hands each batch on with its worker's address. lost: called when Redis is away."""

    def __init__(self, url: str, take: Callable[[str, MemoryBatch], None], lost: Callable[[], None]) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""
        super().__init__(url, [stream_of(shard) for shard in range(NUM_SHARDS)], self._hand_on, lost)
        self._take = take

    def _hand_on(self, fields: dict[bytes, bytes]) -> None:
        if (batch := _batch(fields)) is not None:
            self._take(fields[b"a"].decode(errors="replace"), batch)


def _batch(fields: dict[bytes, bytes]) -> MemoryBatch | None:
    """None: not an entry of ours; a router must not fall over what somebody else wrote there."""
    try:
        epoch, number, kind, keys = fields[b"e"], int(fields[b"n"]), int(fields[b"k"]), fields[b"b"]
        if b"a" not in fields:
            return None
        if kind == ALIVE:
            return MemoryBatch(epoch=epoch, number=number)
        event = MemoryEvent(number=number, kind=MemoryEventKind(kind), keys=keys)
    except (KeyError, ValueError):
        return None
    if len(keys) % KEY_BYTES:
        return None
    return MemoryBatch(epoch=epoch, number=number, events=(event,))
