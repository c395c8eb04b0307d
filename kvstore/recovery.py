"""Opening a store in whatever state it was left: identity, lock, index checked or rebuilt, segment tails settled.

After a crash the index may be older than the segments, never newer in a way that matters: records are durable before
the index names them. So what lies behind the indexed end of a segment is checked and indexed, the rest is cut off; a
segment that the index names nothing in is dropped; and an index that is lost, damaged or at odds with the files is
rebuilt from the headers. docs/FORMAT.md goes through the cases one by one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb
import lmdb.verify
import xxhash

from antefix.errors import BlockCorrupt, ConfigError, Unavailable
from antefix.store.api import RecordKind
from antefix.store.format import (
    BATCH_ALIGN,
    FORMAT_VERSION,
    INDEX_DIR,
    LOCK_FILE,
    RECORD_HEADER_BYTES,
    SEGMENT_DIR,
    SEGMENT_HEADER_BYTES,
    STORE_FILE,
    IndexEntry,
    RecordHeader,
    StoreIdentity,
    align,
    pack_identity,
    segment_number,
    unpack_entry,
    unpack_identity,
    unpack_segment_header,
)
from antefix.store.index import TABLE_OF_KIND, Index
from antefix.store.reader import wall_ms
from kvstore.config import KvStoreConfig
from kvstore.disk import Disk
from kvstore.eviction import EvictionPolicy
from kvstore.forest import insert_entry
from kvstore.index_writer import IndexTxn, SegmentState, read_segments
from kvstore.segments import Segments

log = logging.getLogger("kvstore.recovery")

CLEAN_FILE: Final = "CLEAN"
_REBUILT_DIR: Final = "index.new"
_DISCARDED_DIR: Final = "index.old"
_INDEX_BYTES_MIN: Final = 256 << 20
# Address space, not memory: a repair does not know the service's budget.
_REPAIR_INDEX_BYTES: Final = 16 << 30
_REBUILD_TXN_RECORDS: Final = 20_000
_KNOWN_FILES: Final = {STORE_FILE, LOCK_FILE, CLEAN_FILE, INDEX_DIR, SEGMENT_DIR, _REBUILT_DIR, _DISCARDED_DIR}


@dataclass(slots=True)
class OpenStore:
    """What opening hands to the engine."""

    directory: Path
    identity: StoreIdentity
    index: Index
    segments: Segments
    disk: Disk
    lock_fd: int

    def close(self) -> None:
        """Close cleanly: the index's checksum is written down, so that the next opening need not examine it."""
        self.segments.close()
        self.index.env.sync(True)
        self.index.close()
        self.disk.replace_file(self.directory / CLEAN_FILE, _index_sum(self.directory))
        self._unlock()

    def abandon(self) -> None:
        """Let go without the clean mark, as a crash would."""
        self.segments.close()
        self.index.close()
        self._unlock()

    @property
    def is_open(self) -> bool:
        return self.lock_fd >= 0

    def _unlock(self) -> None:
        os.close(self.lock_fd)
        self.lock_fd = -1


def open_store(config: KvStoreConfig, disk: Disk, clock_ms: Callable[[], int]) -> OpenStore:
    """Raises:  ConfigError: not a store, another format version, or open in another process."""
    directory = Path(config.dir)
    _prepare_directory(directory)
    lock_fd = lock_directory(directory)
    try:
        # 1. Who this store is.
        identity = _identity(directory, disk, clock_ms)
        segments = Segments(directory / SEGMENT_DIR, identity, disk, segment_bytes=config.segment_bytes_in_force)
        # 2. An index that can be trusted.
        index = _open_index(directory, config, segments, disk)
        # 3. Segments and index brought together.
        try:
            _settle_segments(index, segments)
        except _IndexAtOdds as err:
            log.warning("rebuilding the index: %s", err)
            index.close()
            index = _rebuild(directory, index_bytes_max(config), segments)
            _settle_segments(index, segments)
        return OpenStore(directory, identity, index, segments, disk, lock_fd)
    except BaseException:
        os.close(lock_fd)
        raise


class _IndexAtOdds(Exception):
    """Index and segments cannot both be right; the segments are."""


# --- identity ----------------------------------------------------------------------------------------------------


def _prepare_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory")
    directory.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in directory.iterdir()} - {"lost+found"}
    if names and STORE_FILE not in names and SEGMENT_DIR not in names and not names <= _KNOWN_FILES:
        raise ConfigError(f"{directory} is not an Antefix store and not empty; name an empty directory")


def lock_directory(directory: Path) -> int:
    """A descriptor that holds the store's lock until it is closed.

    Raises:  ConfigError: another process has the store open.
    """
    fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(fd)
        raise ConfigError(f"the store in {directory} is open in another process") from err
    return fd


def _identity(directory: Path, disk: Disk, clock_ms: Callable[[], int]) -> StoreIdentity:
    """The STORE file's, or that of the segments where it is lost or damaged, or a new one."""
    path = directory / STORE_FILE
    segment_dir = directory / SEGMENT_DIR
    identity = None
    if path.exists():
        try:
            identity = unpack_identity(path.read_bytes())
        except BlockCorrupt as err:
            log.warning("%s", err)
    if identity is None and segment_dir.exists():
        identity = _identity_of_segments(segment_dir)
        if identity is not None:
            disk.replace_file(path, pack_identity(identity))
    if identity is None:
        if path.exists() and segment_dir.exists() and any(segment_dir.iterdir()):
            raise ConfigError(f"{directory}: neither the STORE file nor any segment can be read; not an Antefix store")
        identity = StoreIdentity(store_id=secrets.token_bytes(16), created_ms=clock_ms())
        segment_dir.mkdir(exist_ok=True)
        disk.replace_file(path, pack_identity(identity))
    if identity.version != FORMAT_VERSION:
        raise ConfigError(
            f"{directory} has format version {identity.version}; this build reads version {FORMAT_VERSION}"
        )
    segment_dir.mkdir(exist_ok=True)
    return identity


def _identity_of_segments(segment_dir: Path) -> StoreIdentity | None:
    for path in sorted(segment_dir.iterdir()):
        if segment_number(path.name) is None:
            continue
        try:
            with path.open("rb") as file:
                return unpack_segment_header(file.read(SEGMENT_HEADER_BYTES))[0]
        except BlockCorrupt:
            continue
    return None


# --- index -------------------------------------------------------------------------------------------------------


def index_bytes_max(config: KvStoreConfig) -> int:
    """Room for the index: an eighth of the budget, which small blocks need; V4-sized ones use a two-thousandth."""
    return max(_INDEX_BYTES_MIN, config.budget_bytes // 8)


def _open_index(directory: Path, config: KvStoreConfig, segments: Segments, disk: Disk) -> Index:
    for leftover in (_REBUILT_DIR, _DISCARDED_DIR):
        shutil.rmtree(directory / leftover, ignore_errors=True)
    fault = _index_fault(directory, segments)
    # From here on the index changes, and its sum would be a lie.
    if (directory / CLEAN_FILE).exists():
        disk.unlink(directory / CLEAN_FILE)
        disk.sync_directory(directory)
    if fault is None:
        try:
            return Index(directory / INDEX_DIR, map_bytes=index_bytes_max(config), write=True)
        except Unavailable as err:
            fault = str(err)
    if segments.sizes:
        log.warning("rebuilding the index: %s", fault)
    return _rebuild(directory, index_bytes_max(config), segments)


def _index_fault(directory: Path, segments: Segments) -> str | None:
    """Why the index must be rebuilt, or None. LMDB trusts what it reads, so a damaged file must not reach it."""
    data = directory / INDEX_DIR / "data.mdb"
    if not data.exists():
        return "there is none"
    clean = directory / CLEAN_FILE
    if clean.exists() and clean.read_bytes() == _index_sum(directory):
        return None
    try:
        verify: Callable[..., object] = lmdb.verify.verify
        verify(str(directory / INDEX_DIR), subdir=True)
    except (lmdb.verify.VerifyError, OSError, ValueError) as err:
        return f"it is damaged ({err})"
    return _entry_fault(directory)


def _entry_fault(directory: Path) -> str | None:
    """Walk every entry of an index that is sound in structure: their own checksums must hold."""
    try:
        index = Index(directory / INDEX_DIR)
    except Unavailable as err:
        return str(err)
    try:
        with index.txn() as txn:
            num_leaves = 0
            for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
                with txn.cursor(db=index.db[TABLE_OF_KIND[kind]]) as cursor:
                    for key, value in cursor:
                        entry = unpack_entry(value, bytes(key))
                        if entry is None:
                            return "an entry is damaged"
                        num_leaves += entry.children == 0
            if txn.stat(index.db["leaves"])["entries"] != num_leaves:
                return "its leaves do not match its entries"
        return None
    finally:
        index.close()


def _index_sum(directory: Path) -> bytes:
    state = xxhash.xxh3_128()
    with (directory / INDEX_DIR / "data.mdb").open("rb") as file:
        while piece := file.read(4 << 20):
            state.update(piece)
    return b"AFXCLEAN" + state.digest()


def rebuild_store(directory: Path, disk: Disk, *, index_bytes: int = _REPAIR_INDEX_BYTES) -> None:
    """Rebuild the index from the records whose payloads are right; the caller holds the lock. For repair."""
    identity = _identity(directory, disk, wall_ms)
    segments = Segments(directory / SEGMENT_DIR, identity, disk, segment_bytes=0)
    for number in list(segments.sizes):
        segments.rewrite_header(number, wall_ms())
    (directory / CLEAN_FILE).unlink(missing_ok=True)
    for leftover in (_REBUILT_DIR, _DISCARDED_DIR):
        shutil.rmtree(directory / leftover, ignore_errors=True)
    index = _rebuild(directory, index_bytes, segments, check_all=True)
    _settle_segments(index, segments)
    segments.close()
    index.close()


def _rebuild(directory: Path, index_bytes: int, segments: Segments, *, check_all: bool = False) -> Index:
    """A new index from the segments' headers, put in place only when it is whole."""
    new = directory / _REBUILT_DIR
    new.mkdir()
    index = Index(new, map_bytes=index_bytes, write=True)
    headers: dict[tuple[RecordKind, bytes], RecordHeader] = {}
    last = max(segments.sizes, default=0)
    for number in sorted(segments.sizes):
        # The last segment may end in a batch that was never acknowledged; the others were synced before it began.
        for header in segments.scan(number, check_payloads=check_all or number == last):
            headers[header.kind, header.hash] = header
    # Parents have smaller positions; a checkpoint comes after the block that it hangs on.
    order = sorted(headers.values(), key=lambda header: (header.position, header.kind))
    index_headers(index, order)
    with IndexTxn(index) as txn:
        for number in segments.sizes:
            _set_end(txn, number, min(_end_of(order, number), segments.sizes[number]))
    index.close()
    old = directory / INDEX_DIR
    if old.exists():
        segments.disk.rename(old, directory / _DISCARDED_DIR)
    segments.disk.rename(new, old)
    segments.disk.sync_directory(directory)
    shutil.rmtree(directory / _DISCARDED_DIR, ignore_errors=True)
    return Index(old, map_bytes=index_bytes, write=True)


def index_headers(index: Index, headers: Iterable[RecordHeader]) -> int:
    """Index records that lie in segments, parents first, leaving out those without one. Returns how many went in."""
    policy = EvictionPolicy()
    ordered = list(headers)
    num_indexed = 0
    for first in range(0, len(ordered), _REBUILD_TXN_RECORDS):
        with IndexTxn(index) as txn:
            for header in ordered[first : first + _REBUILD_TXN_RECORDS]:
                # When it was last used is lost with the index; when it was written is the best guess.
                num_indexed += insert_entry(txn, header, policy, used_ms=header.created_ms)
    return num_indexed


def _end_of(headers: Iterable[RecordHeader], number: int) -> int:
    ends = (header.offset + header.extent_bytes for header in headers if header.segment == number)
    return align(max(ends, default=SEGMENT_HEADER_BYTES), BATCH_ALIGN)


def _set_end(txn: IndexTxn, number: int, end: int) -> None:
    txn.set_segment(number, dataclasses.replace(txn.segment(number) or SegmentState(), end=end))


# --- segments ----------------------------------------------------------------------------------------------------


def _settle_segments(index: Index, segments: Segments) -> None:
    """Index what lies whole behind the committed ends, cut off the rest, drop what nothing refers to."""
    with index.txn() as txn:
        states = read_segments(index, txn)
    for number, state in states.items():
        if state.live_records and segments.sizes.get(number, 0) < state.end:
            raise _IndexAtOdds(f"segment {number} is missing or shorter than {state.end} bytes")
    with IndexTxn(index) as txn:
        for number in set(states) - set(segments.sizes):
            txn.set_segment(number, None)
    found: list[RecordHeader] = []
    ends: dict[int, int] = {}
    for number, size in segments.sizes.items():
        known = states[number].end if number in states else 0
        start = max(known, SEGMENT_HEADER_BYTES)
        tail = list(segments.scan(number, start, check_payloads=True)) if size > start else []
        if tail:
            # Seen in the page cache is not yet on the disk, and the index must not be ahead of the segments.
            segments.sync_file(number)
        found += tail
        ends[number] = min(size, max(start, _end_of(tail, number)))
    _index_tails(index, found)
    with IndexTxn(index) as txn:
        for number, end in ends.items():
            _set_end(txn, number, end)
    _close_segments(index, segments, ends, max(states, default=0))


def _index_tails(index: Index, found: list[RecordHeader]) -> None:
    with index.txn() as txn:
        new = [header for header in found if _is_news(index.entry(txn, header.kind, header.hash))]
    index_headers(index, sorted(new, key=lambda header: (header.position, header.kind)))


def _is_news(entry: IndexEntry | None) -> bool:
    return entry is None or entry.quarantined


def _close_segments(index: Index, segments: Segments, ends: dict[int, int], last_known: int) -> None:
    """Cut tails, drop the dead, and go on appending to the last one if it has room."""
    with index.txn() as txn:
        states = read_segments(index, txn)
    segments.start_after(last_known)
    for number in sorted(ends):
        if states[number].live_records == 0:
            segments.drop(number)
            with IndexTxn(index) as txn:
                txn.set_segment(number, None)
        elif segments.sizes[number] > ends[number]:
            segments.resume(number, ends[number])
    last = max(segments.sizes, default=None)
    if last is not None and segments.sizes[last] + RECORD_HEADER_BYTES < segments.segment_bytes:
        segments.resume(last, segments.sizes[last])
    else:
        segments.close()
