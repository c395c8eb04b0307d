"""Following a store's events from another process: what is stored now, then every change, without gaps."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import IntEnum

from antefix import rpc
from antefix.store.client import RemoteStore
from antefix.store.pieces import split_hashes
from antefix.v1 import kvstore_pb2


class StoreEventKind(IntEnum):
    """As in kvstore.proto."""

    STORED = 1
    EVICTED = 2
    CHECKPOINTED = 3
    CHECKPOINT_EVICTED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreEvent:
    kind: StoreEventKind
    hashes: list[bytes]
    fingerprint: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a watcher stands; hand it back to `watch` to go on there. The empty one asks for a snapshot."""

    epoch: bytes = b""
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchBatch:
    """snapshot_begins: forget what was known of this store before applying `events`.

    cursor: where to go on after this batch; None inside a snapshot, which is of use only as a whole.
    """

    cursor: Cursor | None
    snapshot_begins: bool
    events: list[StoreEvent]


async def watch(store: RemoteStore, cursor: Cursor | None = None) -> AsyncGenerator[WatchBatch, None]:
    """Yield batches until the stream breaks.

    Raises:  Unavailable: the service went away; call again with the last cursor.
    """
    start = cursor or Cursor()
    request = kvstore_pb2.WatchRequest(epoch=start.epoch, after=start.number)
    in_snapshot = False
    with rpc.rpc_errors():
        async for response in store.stub.Watch(request):
            begins = response.snapshot and not in_snapshot
            in_snapshot = response.snapshot and not response.snapshot_end
            yield WatchBatch(
                cursor=None if in_snapshot else Cursor(epoch=response.epoch, number=response.number),
                snapshot_begins=begins,
                events=[
                    StoreEvent(
                        kind=StoreEventKind(event.kind),
                        hashes=split_hashes(event.hashes),
                        fingerprint=event.fingerprint,
                    )
                    for event in response.events
                ],
            )
