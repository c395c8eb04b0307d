"""The index of sealed segments: request id -> segment, offset. The index is derived from the segments and can always be
rebuilt.

One durable transaction updates the index when a segment is sealed, and also records the last entry covered. The entries
of the open segment are held in memory. So after a crash the index can only lack the newest segments, and opening the
ledger adds them.

LMDB writes the file and has it open only while it writes. All other reads parse the file's pages without a memory map
(`antefix.store_files.index_pages`), so damage to the file cannot crash the process. A damaged index is rebuilt.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb
import lmdb.verify
import xxhash

from antefix.errors import Unavailable
from antefix.host_limits import map_bytes_of
from antefix.lmdb_path import lmdb_path
from antefix.own_files import open_to_read, put_aside, read_small
from antefix.store_files.index_pages import MAIN_TABLE, PageFile, PageTxn
from antefix_billing.usage_record import OpenEntry

log = logging.getLogger("antefix_billing")

# LMDB's address space while a segment is sealed: twice the size of the existing index, plus this.
_MAP_BYTES_MORE: Final = 64 << 20
_PLACE: Final = struct.Struct("<QQQ")
_COVERED: Final = b"covered"
# The row that names the ledger and the version of this file format.
_ABOUT: Final = b"about"
_VERSION: Final = 2
_OPEN: Final = b"open:"
_SEGMENT: Final = b"segment:"
# The row with the file's checksum. It exists only while the ledger is closed after an orderly shutdown.
_CLEAN_FILE: Final = "CLEAN"
_DATA_FILE: Final = "data.mdb"
_SUM_BYTES: Final = 16
# The index of a hundred million requests. Reading a larger file would make the start take minutes.
_BYTES_BELIEVED: Final = 16 << 30


class LedgerIndexDamaged(Unavailable):
    """The index cannot be read, or its contents are impossible. The ledger then rebuilds the index from the
    segments.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPlace:
    """An entry's sequence number, its segment's first sequence number, and its byte offset there."""

    sequence: int
    segment: int
    offset: int


class LedgerIndex:
    """The index, in a directory inside the ledger's. Not thread-safe."""

    def __init__(self, directory: Path, source: bytes) -> None:
        """Opens the existing index of the ledger if it is intact and belongs to this ledger. If no usable index exists,
        an empty index is made.
        """
        self._directory = directory
        self._path = directory / _DATA_FILE
        self._about = _VERSION.to_bytes(4, "little") + source
        self._file: PageFile | None = None
        put_aside(directory, stat.S_ISDIR)
        directory.mkdir(mode=0o700, exist_ok=True)
        for name in (_DATA_FILE, "lock.mdb", _CLEAN_FILE):
            put_aside(directory / name)
        if fault := self._fault():
            log.warning("the ledger's index in %s is rebuilt: %s", directory, fault)
            self.clear()

    @property
    def covered(self) -> int:
        """The sequence number of the last sealed entry in the index; 0 if the index is empty."""
        value = self._get(_COVERED)
        return int.from_bytes(value, "little") if value else 0

    def find(self, key: str) -> EntryPlace | None:
        """The place of the request's last settled attempt.  Raises:  LedgerIndexDamaged."""
        value = self._get(_name(key))
        if value is None:
            return None
        sequence, segment, offset = _PLACE.unpack(value)
        return EntryPlace(sequence=sequence, segment=segment, offset=offset)

    def segments(self) -> dict[int, int]:
        """The length in bytes of each sealed segment, by its first sequence number."""
        rows = self._rows(_SEGMENT)
        return {int.from_bytes(key[-8:], "big"): int.from_bytes(value, "little") for key, value in rows}

    def unsettled(self) -> dict[str, OpenEntry]:
        """Requests that were still open when the last segment was sealed."""
        entries = [OpenEntry.from_payload(value) for _, value in self._rows(_OPEN)]
        return {entry.key: entry for entry in entries}

    def seal(
        self,
        places: Mapping[str, EntryPlace],
        unsettled: Mapping[str, OpenEntry],
        covered: int,
        sizes: Mapping[int, int],
    ) -> None:
        """Add a sealed segment's entries. When this returns, the index is durable.

        sizes: the lengths of the segments that hold these entries, by first sequence number.
        """
        gone = [key for key, _ in self._rows(_OPEN)]
        (self._directory / _CLEAN_FILE).unlink(missing_ok=True)

        def write(txn: lmdb.Transaction) -> None:
            for name in gone:
                txn.delete(name)
            rows = [(_OPEN + _name(key), entry.to_payload()) for key, entry in unsettled.items()]
            rows += [
                (_SEGMENT + first.to_bytes(8, "big"), nbytes.to_bytes(8, "little")) for first, nbytes in sizes.items()
            ]
            rows += [
                (_name(key), _PLACE.pack(place.sequence, place.segment, place.offset)) for key, place in places.items()
            ]
            for name, value in sorted([*rows, (_ABOUT, self._about), (_COVERED, covered.to_bytes(8, "little"))]):
                txn.put(name, value + _crc(name, value))

        self._write(write)

    def clear(self) -> None:
        """Make the index empty."""
        self._let_go()
        put_aside(self._directory, stat.S_ISDIR)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Store the index file's checksum, so that the next opening need not examine the whole index."""
        self._let_go()
        path = self._path
        if path.exists():
            try:
                (self._directory / _CLEAN_FILE).write_bytes(_sum_of(path))
            except OSError as err:
                log.warning("the ledger's index could not be marked as complete: %s; the next start checks it", err)

    def _write(self, change: Callable[[lmdb.Transaction], None]) -> None:
        path = self._path
        nbytes = map_bytes_of(2 * (path.stat().st_size if path.exists() else 0) + _MAP_BYTES_MORE)
        with (
            lmdb_path(self._directory) as directory,
            lmdb.open(directory, map_size=nbytes, subdir=True, max_dbs=0, mode=0o600) as env,
            env.begin(write=True) as txn,
        ):
            change(txn)
        self._let_go()

    def _opened(self) -> PageFile | None:
        if self._file is not None and self._file.is_replaced:
            self._let_go()
            raise LedgerIndexDamaged(f"{self._path} is gone or was replaced")
        if self._file is None and self._path.exists():
            try:
                self._file = PageFile(self._path)
            except Unavailable as err:
                raise LedgerIndexDamaged(str(err)) from err
        return self._file

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _get(self, key: bytes) -> bytes | None:
        file = self._opened()
        try:
            value = None if file is None else PageTxn(file).get(key, db=MAIN_TABLE)
        except Unavailable as err:
            raise LedgerIndexDamaged(str(err)) from err
        return None if value is None else self._checked(key, value)

    def _checked(self, key: bytes, value: bytes) -> bytes:
        """A row's value without its checksum, which is verified here because LMDB does not check the data that it
        returns.
        """
        if value[-4:] != _crc(key, value[:-4]):
            raise LedgerIndexDamaged(f"a row of the ledger's index in {self._directory} is damaged")
        return value[:-4]

    def _rows(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        file = self._opened()
        if file is None:
            return []
        found = []
        try:
            for key, value in PageTxn(file).cursor(db=MAIN_TABLE).starting(prefix):
                if not key.startswith(prefix):
                    break
                found.append((key, self._checked(key, value)))
        except Unavailable as err:
            raise LedgerIndexDamaged(str(err)) from err
        return found

    def _fault(self) -> str:
        """Why the existing index cannot be used; empty if it can be used, or if there is none."""
        path = self._path
        clean = self._directory / _CLEAN_FILE
        verify: Callable[..., list[str]] = lmdb.verify.verify
        if not path.exists():
            return "it is gone" if clean.exists() else ""
        try:
            if path.stat().st_size > _BYTES_BELIEVED:
                return "it is far larger than an index becomes"
            file = self._opened()
            assert file is not None
            if not file.is_whole:
                return "it is shorter than it says"
            if clean.exists():
                if read_small(clean, _SUM_BYTES) != _sum_of(path):
                    return "it is not what it was when the ledger was closed"
            else:
                with lmdb_path(self._directory) as directory:
                    faults = verify(directory, subdir=True)
                if faults:
                    return str(faults[0])
            return "" if self._get(_ABOUT) == self._about else "it is another ledger's, or of another version"
        except (Unavailable, lmdb.verify.VerifyError, OSError, ValueError) as err:
            return str(err)


def _sum_of(path: Path) -> bytes:
    state = xxhash.xxh3_128()
    with os.fdopen(open_to_read(path), "rb") as file:
        while piece := file.read(4 << 20):
            state.update(piece)
    return state.digest()


def _crc(name: bytes, value: bytes) -> bytes:
    return zlib.crc32(value, zlib.crc32(name)).to_bytes(4, "little")


def _name(key: str) -> bytes:
    # Ids come from callers and may be longer than LMDB's maximum key, so the key is a hash of 16 bytes. Such hashes do
    # not collide by accident, and the entry found is also compared with the id itself.
    return b"r" + hashlib.blake2b(key.encode(), digest_size=16, person=b"antefix-request").digest()
