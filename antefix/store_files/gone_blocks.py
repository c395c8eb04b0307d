"""Remembers why blocks were removed from the store, in one file of bounded size next to the index.

The file GONE is an array of 16-byte slots: 15 bytes of a block's hash, and one byte for the reason of its removal. A
block's hash selects its slot, so a block removed later may overwrite the slot; an overwritten block is reported as
never seen. The file is written without a sync and read without a lock, because it only serves to explain misses.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from antefix.miss_reason import MissReason
from antefix.own_files import open_to_read
from antefix.record import BlockFate, RecordKind
from antefix.store_files.index import Index

GONE_FILE: Final = "GONE"
SLOT_BYTES: Final = 16
_NAME_BYTES: Final = SLOT_BYTES - 1
# One slot per 32 KiB of budget: about ten times as many slots as blocks of a large model that fit into the budget. The
# file takes a 2,000th of the budget.
_BUDGET_BYTES_A_SLOT: Final = 32 << 10
_NUM_SLOTS_MIN: Final = 256
_NUM_SLOTS_MAX: Final = 1 << 22
# Values are part of the format: never renumber.
_CODES: Final = {1: MissReason.EVICTED, 2: MissReason.EXPIRED}


class GoneWriter:
    """Writes the file, for the engine. The writer never raises, because a failed write only loses an explanation."""

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        num_slots = max(_NUM_SLOTS_MIN, min(_NUM_SLOTS_MAX, budget_bytes // _BUDGET_BYTES_A_SLOT))
        self.nbytes = num_slots * SLOT_BYTES
        self._path = directory / GONE_FILE
        self._noted: list[tuple[bytes, int]] = []
        self._waits = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A context that writes all collected notes about removed blocks at its end. Opening the file for each note
        took a quarter of an eviction's time.
        """
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
            self._write()

    def note(self, block_hash: bytes, reason: MissReason) -> None:
        """Record the reason why this block is being removed."""
        self._noted.append((block_hash, next(code for code, known in _CODES.items() if known is reason)))
        if not self._waits:
            self._write()

    def _write(self) -> None:
        noted, self._noted = self._noted, []
        if not noted:
            return
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(fd).st_size != self.nbytes:
                    # The file is new, or was made under another budget, in which hashes have other slots.
                    os.ftruncate(fd, 0)
                    os.ftruncate(fd, self.nbytes)
                for block_hash, code in noted:
                    os.pwrite(fd, block_hash[:_NAME_BYTES] + bytes((code,)), _offset(block_hash, self.nbytes))
            finally:
                os.close(fd)


def fate_of(
    directory: Path,
    index: Index,
    block_hash: bytes,
    *,
    fingerprint: bytes,
    now_ms: int,
    owners: Collection[bytes] | None = None,
) -> BlockFate:
    """Why the store has or lacks a block, by the index, or else by the GONE file; with all other fingerprints of the
    store.

    owners: as in `Index.lookup`.
    """
    with index.txn() as txn:
        others = tuple(digest for digest in index.fingerprints(txn).values() if digest != fingerprint)
        statements = tuple(index.statement(txn, digest) for digest in others)
        ids = index.owner_ids(txn, owners)
        reason = _indexed(index, txn, block_hash, fingerprint, now_ms, ids)
    return BlockFate(
        reason=remembered(directory, block_hash) if reason is None else reason,
        fingerprints=others,
        statements=statements,
    )


def _indexed(
    index: Index, txn: Any, block_hash: bytes, fingerprint: bytes, now_ms: int, owner_ids: frozenset[int] | None
) -> MissReason | None:
    entry = index.entry(txn, RecordKind.BLOCK, block_hash)
    if entry is None or (owner_ids is not None and entry.tenant_id not in owner_ids):
        return None
    if entry.fingerprint_id != index.fingerprint_id(txn, fingerprint):
        return MissReason.FINGERPRINT_DIFFERS
    if entry.quarantined:
        return MissReason.CORRUPT
    return MissReason.NONE if entry.live(now_ms) else MissReason.EXPIRED


def remembered(directory: Path, block_hash: bytes) -> MissReason:
    """Why a block that is not in the index was removed from the store: EVICTED, EXPIRED, or FIRST_SEEN if the file does
    not say.
    """
    try:
        with os.fdopen(open_to_read(directory / GONE_FILE), "rb", buffering=0) as file:
            nbytes = os.fstat(file.fileno()).st_size
            slot = os.pread(file.fileno(), SLOT_BYTES, _offset(block_hash, nbytes)) if nbytes >= SLOT_BYTES else b""
    except OSError:
        return MissReason.FIRST_SEEN
    if len(slot) != SLOT_BYTES or slot[:_NAME_BYTES] != block_hash[:_NAME_BYTES]:
        return MissReason.FIRST_SEEN
    return _CODES.get(slot[_NAME_BYTES], MissReason.FIRST_SEEN)


def _offset(block_hash: bytes, nbytes: int) -> int:
    return int.from_bytes(block_hash[-8:], "little") % (nbytes // SLOT_BYTES) * SLOT_BYTES
