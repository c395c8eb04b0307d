"""Turns records into the bytes to be written: compressed, encrypted, with a header. Holds no store state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from antefix.record import Record, RecordName, Refusal, RefusalReason
from antefix.store_files.encryption import KeyRing
from antefix.store_files.record_draft import draft_of
from antefix.store_files.record_format import RecordFlag
from antefix.store_files.record_header import owner_row
from antefix_kvstore.compression import Compression
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.segments import Draft

# Threads help because zstd and AES release the GIL.
_NUM_THREADS = 4


class Drafter:
    """Makes drafts (records ready to write) by the store's settings. Thread-safe."""

    def __init__(
        self, config: KvStoreConfig, compression: Compression, keys: KeyRing | None, clock_ms: Callable[[], int]
    ) -> None:
        self._config = config
        self._compression = compression
        self._keys = keys
        self._clock_ms = clock_ms
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="antefix-draft")

    def close(self) -> None:
        self._pool.shutdown()

    def refusal(self, record: Record) -> Refusal | None:
        """Why a record cannot be written at all; None if it can be written."""
        if self._keys is not None and owner_row(record.version, record.tenant) not in self._keys:
            return Refusal(
                RefusalReason.NO_KEY, f"this store is encrypted and has no key for tenant {record.tenant.hex()}"
            )
        return None

    def drafts(self, records: Sequence[Record], first: set[RecordName]) -> list[Draft]:
        """One draft per record is returned. first: names of the records that begin a chain."""
        works = self._keys is not None or any(self._compression.wants(record) for record in records)
        mapping = self._pool.map if works and len(records) > 1 else map
        return list(mapping(lambda record: self._draft(record, (record.kind, record.hash) in first), records))

    def _draft(self, record: Record, is_first: bool) -> Draft:
        now_ms = self._clock_ms()
        ttl_s = self._config.ttl_s(record.kind) if record.ttl_s is None else record.ttl_s
        coded = self._compression.encode(record)
        header, stored = draft_of(
            record,
            coded,
            self._keys,
            created_ms=now_ms,
            expires_ms=now_ms + round(ttl_s * 1000) if ttl_s else 0,
            flags=(RecordFlag.FIRST if is_first else RecordFlag.NONE)
            | (RecordFlag.ELSEWHERE if record.parent_elsewhere else RecordFlag.NONE),
        )
        return Draft(header, stored)
