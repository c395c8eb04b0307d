"""Checks an index before it is used, and rebuilds it from the segments' headers if it is not sound.

LMDB trusts the file that it maps, so it must never open a damaged one. An index is opened only if its checksum from the
last clean close still matches. After a crash there is no such checksum; then `index_check`, which does not use LMDB,
must find that its structure is sound and its tables match its entries, which have checksums of their own.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import xxhash

from antefix.errors import Unavailable
from antefix.host_limits import map_bytes_of
from antefix.own_files import open_to_read, read_small
from antefix.store_files.index import DATA_FILE, Index
from antefix.store_files.record_format import INDEX_DIR, SEGMENT_HEADER_BYTES
from antefix.store_files.record_header import RecordHeader
from antefix_kvstore.disk import Disk
from antefix_kvstore.eviction import EvictionPolicy
from antefix_kvstore.identity import CLEAN_FILE, DISCARDED_DIR, REBUILT_DIR
from antefix_kvstore.index_check import index_fault
from antefix_kvstore.index_forest import insert_entry
from antefix_kvstore.index_rebuild import fill_index
from antefix_kvstore.index_writer import IndexTxn, SegmentState
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.segments import Segments

log = logging.getLogger("antefix_kvstore.index")

_INDEX_BYTES_MIN: Final = 256 << 20
# Reading an index of this size takes some seconds. An index made under a larger budget may exceed the present limit.
_INDEX_BYTES_BELIEVED: Final = 16 << 30
_SUM_MAGIC: Final = b"AFXCLEAN"
_SUM_BYTES: Final = len(_SUM_MAGIC) + 16
_REBUILD_TXN_RECORDS: Final = 20_000


def index_bytes_max(config: KvStoreConfig) -> int:
    """Size limit of the index: an eighth of the budget, enough for small blocks; V4-sized blocks use a two-thousandth.

    LMDB's map reserves its size in address space at once, so under `ulimit -v` it takes a quarter of that limit at
    most.
    """
    return map_bytes_of(max(_INDEX_BYTES_MIN, config.budget_bytes // 8))


def open_index(directory: Path, config: KvStoreConfig, segments: Segments, disk: Disk) -> Index:
    remove_leftovers(directory)
    fault = _index_fault(directory, config)
    # From here on the index changes, so its stored checksum would be wrong.
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
    return rebuild_index(directory, index_bytes_max(config), segments)


def remove_leftovers(directory: Path) -> None:
    """Delete the files that an interrupted rebuild left behind."""
    for leftover in (REBUILT_DIR, DISCARDED_DIR):
        shutil.rmtree(directory / leftover, ignore_errors=True)


def _index_fault(directory: Path, config: KvStoreConfig) -> str | None:
    """Why the index must be rebuilt; None if it may be opened."""
    data = directory / INDEX_DIR / "data.mdb"
    if not data.exists():
        return "there is none"
    if data.stat().st_size > max(_INDEX_BYTES_BELIEVED, 4 * index_bytes_max(config)):
        return "it is far larger than an index of this store becomes"
    clean = directory / CLEAN_FILE
    if clean.exists():
        # The checksum file is deleted before the index changes. So where both exist they agree, or one of them is
        # damaged.
        sealed = read_small(clean, _SUM_BYTES)
        return None if sealed == index_sum(directory) else "it is not what it was when the store was closed"
    fault = index_fault(directory / INDEX_DIR)
    return f"it is damaged ({fault})" if fault else None


def index_sum(directory: Path) -> bytes:
    state = xxhash.xxh3_128()
    with os.fdopen(open_to_read(directory / INDEX_DIR / DATA_FILE), "rb") as file:
        while piece := file.read(4 << 20):
            state.update(piece)
    return _SUM_MAGIC + state.digest()


def rebuild_index(directory: Path, index_bytes: int, segments: Segments, *, check_all: bool = False) -> Index:
    """A new index, made from the segments' headers and put in place only when it is complete."""
    new = directory / REBUILT_DIR
    new.mkdir(mode=0o700)
    _fill(lambda: Index(new, map_bytes=index_bytes, write=True, durable=False), segments, check_all)
    old = directory / INDEX_DIR
    if old.exists():
        segments.disk.rename(old, directory / DISCARDED_DIR)
    segments.disk.rename(new, old)
    segments.disk.sync_directory(directory)
    shutil.rmtree(directory / DISCARDED_DIR, ignore_errors=True)
    return Index(old, map_bytes=index_bytes, write=True)


def _fill(open_index: Callable[[], Index], segments: Segments, check_all: bool) -> None:
    # A new store has nothing to scan.
    ends = fill_index(open_index, segments, check_all=check_all) if segments.sizes else {}
    if ends:
        # All other segments were synced before this one began. The index must not be ahead of the segments.
        segments.sync_file(max(ends))
    index = open_index()
    try:
        with IndexTxn(index) as txn:
            for number, size in segments.sizes.items():
                set_end(txn, number, min(ends.get(number, SEGMENT_HEADER_BYTES), size))
        index.env.sync(True)
    finally:
        index.close()


def index_headers(index: Index, headers: Iterable[RecordHeader]) -> int:
    """Index records of segments, parents first. Records whose parent is not indexed are left out. Returns the number
    indexed.
    """
    policy = EvictionPolicy()
    ordered = list(headers)
    num_indexed = 0
    for first in range(0, len(ordered), _REBUILD_TXN_RECORDS):
        with IndexTxn(index) as txn:
            for header in ordered[first : first + _REBUILD_TXN_RECORDS]:
                # The time of last use is lost with the index; the time of writing is the best guess.
                num_indexed += insert_entry(txn, header, policy, used_ms=header.created_ms)
    return num_indexed


def ends_of(headers: Iterable[RecordHeader]) -> dict[int, int]:
    """For each segment, the offset at which the segment's last record ends.

    The offset is the exact end, not the start of the next batch. A torn record's header may lie in between; if a new
    batch overwrote only its payload, a scan would trust that header and skip the new batch's beginning.
    """
    ends: dict[int, int] = {}
    for header in headers:
        ends[header.segment] = max(ends.get(header.segment, 0), header.offset + header.extent_bytes)
    return ends


def set_end(txn: IndexTxn, number: int, end: int) -> None:
    txn.set_segment(number, dataclasses.replace(txn.segment(number) or SegmentState(), end=end))
