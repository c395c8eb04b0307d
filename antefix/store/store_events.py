"""A store's events on the wire: protobuf and Redis stop here.

antefix:store:{<name>}       a stream in Redis; the name is what routers call the store, their store_address
    a  the name      e  epoch      n  number of the event      k  kind, 0 alive      f  fingerprint
    b  8 bytes of each hash, one after the other
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from antefix.events.block_events import KEY_BYTES, EventKind, StoreEvent
from antefix.events.event_wire import response_of
from antefix.events.numbered_log import Batch
from antefix.events.stream_format import Fields, StreamFormat, known_kind
from antefix.store.pieces import join_hashes, split_hashes
from antefix.v1 import kvstore_pb2


def store_response(batch: Batch[StoreEvent]) -> kvstore_pb2.WatchResponse:
    return response_of(batch, kvstore_pb2.WatchResponse, _to_wire)


def store_event_of(event: kvstore_pb2.StoreEvent) -> StoreEvent:
    """Raises:  InvalidRequest: not a whole number of hashes."""
    return StoreEvent(
        kind=EventKind(event.kind), hashes=tuple(split_hashes(event.hashes)), fingerprint=event.fingerprint
    )


def stream_of(name: str) -> str:
    return f"antefix:store:{{{name}}}"


def _to_wire(event: StoreEvent) -> kvstore_pb2.StoreEvent:
    return kvstore_pb2.StoreEvent(
        kind=event.kind.value,  # type: ignore[arg-type]
        hashes=join_hashes(event.hashes),
        fingerprint=event.fingerprint,
    )


def _pack(event: StoreEvent) -> Fields:
    keys = b"".join([name[:KEY_BYTES] for name in event.hashes])
    return {"k": int(event.kind), "f": event.fingerprint, "b": keys}


def _unpack(fields: Mapping[bytes, bytes]) -> StoreEvent:
    keys = fields[b"b"]
    if len(keys) % KEY_BYTES:
        raise ValueError("not whole keys")
    hashes = tuple(keys[first : first + KEY_BYTES] for first in range(0, len(keys), KEY_BYTES))
    return StoreEvent(kind=known_kind(fields), hashes=hashes, fingerprint=fields[b"f"])


STORE_STREAM: Final = StreamFormat(stream_of=stream_of, pack=_pack, unpack=_unpack)
