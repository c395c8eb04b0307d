"""The contents of a store that is served, for copies from another host; `StoreContents` does the same for a
directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from antefix import rpc
from antefix.blocking import LoopThread
from antefix.record import Record, RecordKind, RecordName
from antefix.store.remote_store import RemoteStore
from antefix.v1 import kvstore_pb2
from antefix_kvstore.contents_wire import layout_from_wire, stretch_from_wire
from antefix_kvstore.store_contents import LayoutOf, Stretch

_BATCH_RECORDS: Final = 256
# The store reads its whole index before it sends the first stretch.
_DEADLINE_S: Final = 600.0


class ServedContents:
    """Calls block; for tools. The list of stored records is read at the first call, records when they are requested."""

    def __init__(self, store: RemoteStore) -> None:
        """store: the client of the store, which is closed when this object is closed."""
        self._store: Final = store
        self._thread: Final = LoopThread()
        self._layouts: list[LayoutOf] | None = None
        self._stretches: list[Stretch] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        try:
            self._thread.run(self._store.close())
        finally:
            self._thread.close()

    def layouts(self) -> list[LayoutOf]:
        """As `StoreContents.layouts`.  Raises:  AntefixError: the store does not answer, or denies us access."""
        if self._layouts is None:
            self._thread.run(self._read())
        return self._layouts or []

    def stretches(self) -> list[Stretch]:
        """As `StoreContents.stretches`."""
        self.layouts()
        return self._stretches

    def records(self, stretch: Stretch, wanted: Sequence[RecordName]) -> Iterator[list[Record]]:
        """Works as `StoreContents.records`, but the caller must hold a grant for the stretch's owner."""
        kept = dict(zip(stretch.names, zip(stretch.ttls_s, stretch.costs_ms, strict=True), strict=True))
        for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
            names = [name for each, name in wanted if each is kind]
            while names:
                batch = names[:_BATCH_RECORDS]
                records = self._thread.run(
                    self._store.get_records(kind, batch, fingerprint=stretch.fingerprint, tenant=stretch.owner[1:])
                )
                yield [_as_kept(record, *kept[(kind, record.hash)]) for record in records]
                # Continue after a record that is damaged, gone or of version 1.
                names = names[len(records) + (len(records) < len(batch)) :]

    async def _read(self) -> None:
        layouts: list[LayoutOf] = []
        stretches: list[Stretch] = []
        with rpc.rpc_errors():
            async for message in self._store.stub.Contents(kvstore_pb2.ContentsRequest(), timeout=_DEADLINE_S):
                layouts += map(layout_from_wire, message.layouts)
                stretches += map(stretch_from_wire, message.stretches)
        self._layouts, self._stretches = layouts, stretches


def _as_kept(record: Record, ttl_s: int, cost_ms: int) -> Record:
    return dataclasses.replace(record, ttl_s=float(ttl_s), cost_s=cost_ms / 1000)
