"""What changed in a store, numbered, for those who keep an index of it elsewhere.

Numbers count up within an epoch; an epoch is one opening of the store. A watcher that knows the epoch and a number
still in the ring resumes there; any other gets a snapshot first, taken together with a number, so that nothing is
missed or told twice. Publishing appends to a bounded ring and never waits for anybody.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Final

from antefix.record import RecordKind
from antefix.store_files.index import TABLE_OF_KIND, Change, Index
from antefix.store_files.record_format import unpack_entry

# Hashes kept for watchers that fall behind: 2 MiB of them.
NUM_HASHES_MAX: Final = 65_536
SNAPSHOT_HASHES: Final = 8_192


class EventKind(IntEnum):
    """As in kvstore.proto."""

    STORED = 1
    EVICTED = 2
    CHECKPOINTED = 3
    CHECKPOINT_EVICTED = 4


_KIND_OF: Final = {
    (RecordKind.BLOCK, True): EventKind.STORED,
    (RecordKind.BLOCK, False): EventKind.EVICTED,
    (RecordKind.CHECKPOINT, True): EventKind.CHECKPOINTED,
    (RecordKind.CHECKPOINT, False): EventKind.CHECKPOINT_EVICTED,
}


@dataclass(frozen=True, slots=True)
class Event:
    """Records of one kind and fingerprint that came or went in one transaction."""

    number: int
    kind: EventKind
    hashes: tuple[bytes, ...]
    fingerprint: bytes


class EventLog:
    """The ring. Thread-safe."""

    def __init__(self, index: Index) -> None:
        self.epoch = secrets.token_bytes(16)
        self.number = 0
        self._index = index
        self._lock = threading.Lock()
        self._ring: deque[Event] = deque()
        self._num_hashes = 0
        self._fingerprints: dict[int, bytes] = {}
        self._listeners: set[Callable[[], None]] = set()

    def publish(self, changes: Sequence[Change]) -> None:
        """Called by the writer after each commit, under the engine's lock."""
        with self._lock:
            for (kind, present, fingerprint_id), group in groupby(
                changes, key=lambda change: (change.kind, change.present, change.fingerprint_id)
            ):
                self.number += 1
                hashes = tuple(change.hash for change in group)
                self._ring.append(
                    Event(self.number, _KIND_OF[kind, present], hashes, self._fingerprint(fingerprint_id))
                )
                self._num_hashes += len(hashes)
            while self._num_hashes > NUM_HASHES_MAX and len(self._ring) > 1:
                self._num_hashes -= len(self._ring.popleft().hashes)
            listeners = list(self._listeners)
        for wake in listeners:
            wake()

    def since(self, epoch: bytes, number: int) -> list[Event] | None:
        """Events after `number`, or None when the watcher must take a snapshot."""
        with self._lock:
            oldest = self._ring[0].number if self._ring else self.number + 1
            if epoch != self.epoch or number > self.number or number < oldest - 1:
                return None
            # The ring is in order of numbers, which have no gaps.
            return list(self._ring)[number - oldest + 1 :] if self._ring else []

    def listen(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have `wake` called after each publication, in the writer's thread; it must not block. Returns its undoing."""
        with self._lock:
            self._listeners.add(wake)
        return lambda: self._listeners.discard(wake)

    def snapshot(self) -> tuple[int, Iterator[list[Event]]]:
        """The number that a snapshot taken now stands for, and what is stored, in pieces.

        The caller holds the engine's lock during this call, not while it iterates.
        """
        txn = self._index.txn()
        number = self.number
        # The number of keys first: opening the cursor pins the state of the index.
        txn.stat(self._index.db["blocks"])
        return number, self._pieces(txn, number)

    def _pieces(self, txn: object, number: int) -> Iterator[list[Event]]:
        with txn:  # type: ignore[attr-defined]
            for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
                found: dict[int, list[bytes]] = {}
                count = 0
                with txn.cursor(db=self._index.db[TABLE_OF_KIND[kind]]) as cursor:  # type: ignore[attr-defined]
                    for key, value in cursor:
                        entry = unpack_entry(value, key)
                        if entry is None or entry.quarantined:
                            continue
                        found.setdefault(entry.fingerprint_id, []).append(key)
                        count += 1
                        if count == SNAPSHOT_HASHES:
                            yield self._events(found, kind, number)
                            found, count = {}, 0
                if found:
                    yield self._events(found, kind, number)

    def _events(self, found: dict[int, list[bytes]], kind: RecordKind, number: int) -> list[Event]:
        return [
            Event(number, _KIND_OF[kind, True], tuple(hashes), self._fingerprint(fingerprint_id))
            for fingerprint_id, hashes in found.items()
        ]

    def _fingerprint(self, number: int) -> bytes:
        if number not in self._fingerprints:
            with self._index.txn() as txn:
                self._fingerprints = self._index.fingerprints(txn)
        return self._fingerprints.get(number, b"")
