"""Detects damage to an open store's files before LMDB touches them: reading a truncated file's map kills the
process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import lmdb

from antefix.errors import BlockCorrupt, Unavailable
from antefix.store_files.index import DATA_FILE
from antefix.store_files.index_pages import PageFile
from antefix.store_files.record_format import INDEX_DIR, SEGMENT_DIR, STORE_FILE
from antefix_kvstore.disk_reserve import is_full
from antefix_kvstore.recovery import OpenStore

# LMDB's errors for limits that were reached, which are no damage.
_LIMITS: Final = (lmdb.MapFullError, lmdb.ReadersFullError, lmdb.TxnFullError, lmdb.MemoryError)


class IndexDamaged(Unavailable):
    """The store's index is damaged and is being rebuilt. The caller continues without the store until then."""


def fault_of(store: OpenStore) -> str:
    """What is wrong with the store's files on disk now; empty if nothing can be seen from outside."""
    if not store.lock.is_of_the_present:
        return "its directory is gone or was replaced"
    if store.index.replaced:
        return "its index is gone or was replaced"
    if not (store.directory / SEGMENT_DIR).is_dir():
        return "its segments are gone"
    if not (store.directory / STORE_FILE).exists():
        return "its STORE file is gone"
    return _fault_of_index(store.directory / INDEX_DIR / DATA_FILE)


def _fault_of_index(path: Path) -> str:
    try:
        file = PageFile(path)
    except Unavailable:
        return "its index was overwritten or cut"
    try:
        return "" if file.is_whole else "its index was cut"
    finally:
        file.close()


@contextmanager
def told(directory: Path, tell: Callable[[str], object]) -> Iterator[None]:
    """Turn a report of damage by LMDB or by an entry into IndexDamaged, and call `tell` with it."""
    try:
        yield
    except (lmdb.Error, BlockCorrupt, FileNotFoundError) as err:
        if isinstance(err, _LIMITS) or (isinstance(err, lmdb.Error | OSError) and is_full(err, directory)):
            raise
        tell(str(err))
        # The error's own words, which may have paths, are for the log only.
        raise IndexDamaged("the store's index is damaged and is being rebuilt") from err
