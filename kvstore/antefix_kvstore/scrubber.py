"""Reads all stored records slowly, and quarantines damaged ones before anybody requests them."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Final

from antefix.own_files import open_to_read
from antefix.record import RecordKind, RecordName
from antefix.store_files.index import TABLE_OF_KIND
from antefix.store_files.record_format import (
    RECORD_HEADER_BYTES,
    IndexEntry,
    payload_checksum,
    unpack_entry,
)
from antefix.store_files.record_header import expected_checksum
from antefix_kvstore.storage_engine import StorageEngine

log = logging.getLogger("antefix_kvstore.scrubber")

# Pause after a pass over all records, and between looks at an empty store.
PAUSE_S: Final = 60.0
# Entries are listed in pieces of this many, so that no snapshot of the index is held for long.
NUM_LISTED: Final = 4096


@dataclass(slots=True)
class ScrubCounters:
    passes: int = 0
    records: int = 0
    bytes: int = 0
    corrupt: int = 0


class Scrubber:
    """A thread that reads at most `bytes_per_s` bytes per second."""

    def __init__(self, engine: StorageEngine, bytes_per_s: int, *, pause_s: float = PAUSE_S) -> None:
        self.counters = ScrubCounters()
        self._engine = engine
        self._bytes_per_s = bytes_per_s
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="antefix-scrub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._pause_s):
            try:
                self.scrub()
            except Exception:
                # Whatever is wrong, serving continues, and the next pass tries again.
                log.exception("the scrubber failed")

    def scrub(self) -> int:
        """One pass over all records in the index. Returns how many were quarantined."""
        found = 0
        for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
            last = b""
            while not self._stopping.is_set():
                listed = self._list(kind, last)
                if not listed:
                    break
                last = listed[-1][0][1]
                # In the order of the disk, so that reads are sequential.
                for name, entry in sorted(listed, key=lambda item: (item[1].segment, item[1].offset)):
                    found += self._check(name, entry)
                    if self._stopping.is_set():
                        break
        self.counters.passes += 1
        return found

    def _list(self, kind: RecordKind, after: bytes) -> list[tuple[RecordName, IndexEntry]]:
        index = self._engine.index
        listed: list[tuple[RecordName, IndexEntry]] = []
        with index.txn() as txn, txn.cursor(db=index.db[TABLE_OF_KIND[kind]]) as cursor:
            going = cursor.set_range(after + b"\0") if after else cursor.first()
            while going and len(listed) < NUM_LISTED:
                entry = unpack_entry(cursor.value(), cursor.key())
                if entry is None:
                    self._engine.note_damage("an entry is damaged")
                else:
                    listed.append(((kind, cursor.key()), entry))
                going = cursor.next()
        return listed

    def _check(self, name: RecordName, entry: IndexEntry) -> bool:
        if entry.quarantined:
            return False
        started_s = time.monotonic()
        nbytes = RECORD_HEADER_BYTES + entry.stored_bytes
        self.counters.records += 1
        self.counters.bytes += nbytes
        # The engine checks again before it quarantines: the record may have moved since it was listed.
        corrupt = not self._is_right(name, entry) and self._engine.quarantine(name)
        self.counters.corrupt += corrupt
        self._stopping.wait(max(0.0, nbytes / self._bytes_per_s - (time.monotonic() - started_s)))
        return corrupt

    def _is_right(self, name: RecordName, entry: IndexEntry) -> bool:
        engine = self._engine
        try:
            fd = open_to_read(engine.segments.path(entry.segment))
        except FileNotFoundError:
            return False
        try:
            # A page cache hit says nothing about the disk. So drop the record's pages; a hot record is read again once
            # per pass.
            os.posix_fadvise(fd, entry.offset, RECORD_HEADER_BYTES + entry.stored_bytes, os.POSIX_FADV_DONTNEED)
            raw = os.pread(fd, RECORD_HEADER_BYTES + entry.stored_bytes, entry.offset)
            os.posix_fadvise(fd, entry.offset, len(raw), os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        with engine.index.txn() as txn:
            fingerprint = engine.index.fingerprints(txn).get(entry.fingerprint_id, b"")
        checksum = expected_checksum(
            raw[:RECORD_HEADER_BYTES],
            engine.identity.seed,
            kind=name[0],
            block_hash=name[1],
            fingerprint=fingerprint,
            entry=entry,
        )
        return checksum is not None and payload_checksum(raw[RECORD_HEADER_BYTES:]) == checksum
