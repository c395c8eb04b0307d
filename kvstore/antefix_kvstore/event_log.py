"""Numbered changes of a store, for processes that keep an index of its contents elsewhere. Each opening of the store
begins an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from antefix.events.block_events import BlockEvent, EventKind
from antefix.events.numbered_log import EVENT_BLOCKS_MAX, SNAPSHOT_BLOCKS, Batch, Cursor, NumberedLog, snapshot_batches
from antefix.record import RecordKind
from antefix.store_files.index import TABLE_OF_KIND, Change, Index
from antefix.store_files.record_format import unpack_entry

# The hashes of so many blocks take 2 MiB.
NUM_BLOCKS_MAX: Final = 65_536

_KIND_OF: Final = {
    (RecordKind.BLOCK, True): EventKind.STORED,
    (RecordKind.BLOCK, False): EventKind.EVICTED,
    (RecordKind.CHECKPOINT, True): EventKind.CHECKPOINTED,
    (RecordKind.CHECKPOINT, False): EventKind.CHECKPOINT_EVICTED,
}


class EventLog(NumberedLog[BlockEvent]):
    """A log of events. One event: the records of one kind and fingerprint that came or went in one transaction."""

    def __init__(self, index: Index) -> None:
        super().__init__(num_blocks_max=NUM_BLOCKS_MAX)
        self._index = index
        self._fingerprints: dict[int, bytes] = {}

    def publish(self, changes: Sequence[Change]) -> None:
        """The writer calls this after each commit, under the engine's lock."""
        self.append(
            event
            for (kind, present, fingerprint_id), group in groupby(
                changes, key=lambda change: (change.kind, change.present, change.fingerprint_id)
            )
            for event in self._events(_KIND_OF[kind, present], [change.hash for change in group], fingerprint_id)
        )

    def snapshot(self) -> Iterator[Batch[BlockEvent]]:
        """Everything that is stored at the time of this call; the records are read in batches later.

        The caller holds the engine's lock during this call, but need not hold it while iterating.
        """
        txn = self._index.txn()
        cursor = self.cursor
        # Any read pins the transaction's state of the index; counting keys is a cheap one.
        txn.stat(self._index.db["blocks"])
        return self._pieces(txn, cursor)

    def _pieces(self, txn: Any, cursor: Cursor) -> Iterator[Batch[BlockEvent]]:
        with txn:
            yield from snapshot_batches(cursor, self._stored(txn))

    def _stored(self, txn: Any) -> Iterator[list[BlockEvent]]:
        for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
            found: dict[int, list[bytes]] = {}
            count = 0
            with txn.cursor(db=self._index.db[TABLE_OF_KIND[kind]]) as cursor:
                for key, value in cursor:
                    entry = unpack_entry(value, key)
                    if entry is None or entry.quarantined:
                        continue
                    found.setdefault(entry.fingerprint_id, []).append(key)
                    count += 1
                    if count == SNAPSHOT_BLOCKS:
                        yield self._piece(kind, found)
                        found, count = {}, 0
            if found:
                yield self._piece(kind, found)

    def _piece(self, kind: RecordKind, found: dict[int, list[bytes]]) -> list[BlockEvent]:
        return [
            event
            for fingerprint_id, hashes in found.items()
            for event in self._events(_KIND_OF[kind, True], hashes, fingerprint_id)
        ]

    def _events(self, kind: EventKind, hashes: Sequence[bytes], fingerprint_id: int) -> Iterator[BlockEvent]:
        fingerprint = self._fingerprint(fingerprint_id)
        for first in range(0, len(hashes), EVENT_BLOCKS_MAX):
            yield BlockEvent.of(kind, hashes[first : first + EVENT_BLOCKS_MAX], fingerprint)

    def _fingerprint(self, number: int) -> bytes:
        if number not in self._fingerprints:
            with self._index.txn() as txn:
                self._fingerprints = self._index.fingerprints(txn)
        return self._fingerprints.get(number, b"")
