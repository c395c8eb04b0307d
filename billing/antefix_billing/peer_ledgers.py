"""Reads the ledgers of other routers on this host, to answer questions about their requests. Other routers' ledgers are
never written to, and reading them never waits for their writers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from antefix.errors import AntefixError
from antefix_billing.ledger_files import (
    Settled,
    first_sequence_of,
    hash_before,
    read_entries,
    read_entry_at,
    read_settled,
    segment_path,
    segments_of,
    settled_of,
)
from antefix_billing.ledger_format import EntryKind
from antefix_billing.usage_record import UsageRecord

log = logging.getLogger("antefix_billing")

# How many segments of each ledger are kept in memory. Each holds some 15,000 requests. Older segments are read when
# needed.
_NUM_SEGMENTS_KNOWN: Final = 8


class PeerLedgers:
    """The other routers' ledgers. Methods may be called from any thread; they read files."""

    def __init__(self, directories: Sequence[Path]) -> None:
        """directories: the other ledgers. The directory of a ledger need not exist yet."""
        self.directories = list(directories)
        self._peers = [_Peer(directory) for directory in directories]
        self._mutex = threading.Lock()

    def __len__(self) -> int:
        return len(self._peers)

    def find(self, key: str) -> Settled | None:
        """The request's last attempt, from whichever ledger has it. key: names the request; `record.request_key`."""
        with self._mutex:
            found = [peer.find(key) for peer in self._peers]
        return max((each for each in found if each is not None), key=lambda each: each.record.attempt, default=None)


class _Peer:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._places: dict[str, tuple[int, int]] = {}
        self._first = 0
        self._read_to = 0

    def find(self, key: str) -> Settled | None:
        try:
            self._catch_up()
            if (place := self._places.get(key)) is not None:
                path = segment_path(self._directory, place[0])
                entry = read_entry_at(path, place[1])
                return settled_of(hash_before(path, entry), entry)
            return self._find_old(key)
        except (AntefixError, OSError) as err:
            log.warning("the ledger in %s cannot be queried: %s", self._directory, err)
            return None

    def _catch_up(self) -> None:
        firsts = [first_sequence_of(path) for path in segments_of(self._directory)]
        if not firsts:
            return
        if not self._read_to:
            self._first = firsts[-_NUM_SEGMENTS_KNOWN:][0]
            self._read_to = self._first - 1
        for _, entry in read_entries(self._directory, after=self._read_to):
            if entry.kind is EntryKind.SETTLE:
                segment = max(first for first in firsts if first <= entry.sequence)
                self._places[UsageRecord.from_payload(entry.payload).key] = (segment, entry.offset)
            self._read_to = entry.sequence

    def _find_old(self, key: str) -> Settled | None:
        if self._first <= 1:
            return None
        found = None
        for item in read_settled(self._directory):
            if item.sequence >= self._first:
                break
            found = item if item.record.key == key else found
        return found
