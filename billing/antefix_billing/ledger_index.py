"""Where each request's entry lies in the sealed segments: request id -> segment, offset. Derived, never the truth.

Written once a segment is sealed, in one durable transaction that also says how far it goes; entries of the segment in
hand are in the ledger's memory. So a crash leaves the index behind at most, and opening catches up.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb

from antefix.errors import ConfigError
from antefix.host_limits import map_bytes_of
from antefix.lmdb_path import lmdb_path
from antefix_billing.usage_record import OpenEntry

# LMDB takes address space only. 80 bytes a request: room for 800 million.
_MAP_BYTES: Final = 64 << 30
_PLACE: Final = struct.Struct("<QQQ")
_COVERED: Final = b"covered"
_OPEN: Final = b"open:"


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPlace:
    """An entry's sequence number, its segment's first sequence number, and its byte offset there."""

    sequence: int
    segment: int
    offset: int


class LedgerIndex:
    """LMDB under the ledger's directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        map_bytes = map_bytes_of(_MAP_BYTES)
        try:
            with lmdb_path(directory) as path:
                self._env = lmdb.open(path, map_size=map_bytes, subdir=True, max_dbs=0, mode=0o600)
        except lmdb.MemoryError as err:
            raise ConfigError(
                f"the ledger's index {directory} cannot be mapped: there is no address space for {map_bytes} bytes;"
                " raise or unset `ulimit -v`"
            ) from err

    @property
    def covered(self) -> int:
        """The last sequence number of the sealed segments that are in here; 0 when empty."""
        with self._env.begin() as txn:
            value = txn.get(_COVERED)
        return int.from_bytes(value, "little") if value else 0

    def find(self, key: str) -> EntryPlace | None:
        """Where the request's last settled attempt lies."""
        with self._env.begin() as txn:
            value = txn.get(_name(key))
        if value is None:
            return None
        sequence, segment, offset = _PLACE.unpack(value)
        return EntryPlace(sequence=sequence, segment=segment, offset=offset)

    def unsettled(self) -> dict[str, OpenEntry]:
        """Requests that were open when the last segment was sealed."""
        found: dict[str, OpenEntry] = {}
        with self._env.begin() as txn, txn.cursor() as cursor:
            if cursor.set_range(_OPEN):
                for key, value in cursor:
                    if not key.startswith(_OPEN):
                        break
                    entry = OpenEntry.from_payload(value)
                    found[entry.key] = entry
        return found

    def seal(self, places: Mapping[str, EntryPlace], unsettled: Mapping[str, OpenEntry], covered: int) -> None:
        """Take over a sealed segment's entries; durable when this returns."""
        with self._env.begin(write=True) as txn:
            for name in [_OPEN + _name(key) for key in self.unsettled()]:
                txn.delete(name)
            for key, entry in unsettled.items():
                txn.put(_OPEN + _name(key), entry.to_payload())
            for name, place in sorted((_name(key), place) for key, place in places.items()):
                txn.put(name, _PLACE.pack(place.sequence, place.segment, place.offset))
            txn.put(_COVERED, covered.to_bytes(8, "little"))

    def clear(self) -> None:
        with self._env.begin(write=True) as txn:
            txn.drop(self._env.open_db(txn=txn), delete=False)

    def close(self) -> None:
        self._env.close()


def _name(key: str) -> bytes:
    # Ids come from callers and may be longer than LMDB's keys; 16 bytes of hash never collide by accident, and the
    # entry that is found is compared with the id itself.
    return b"r" + hashlib.blake2b(key.encode(), digest_size=16, person=b"antefix-request").digest()
