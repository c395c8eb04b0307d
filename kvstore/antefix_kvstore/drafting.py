"""Turning records into what is written down: coded, encrypted, headed. Holds no store state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from antefix.record import Record, RecordName, Refusal, RefusalReason
from antefix.store_files.encryption import TAG_BYTES, KeyRing, fresh_nonce
from antefix.store_files.record_format import NONCE_BYTES, Codec, RecordFlag
from antefix.store_files.record_header import RecordHeader, owner_row
from antefix_kvstore.compression import Compression
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.segments import Draft

# zstd and AES release the GIL.
_NUM_THREADS = 4


class Drafter:
    """Makes drafts by the store's settings. Thread-safe."""

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
        """Why a record cannot be written down at all, or None."""
        if self._keys is not None and owner_row(record.version, record.tenant) not in self._keys:
            return Refusal(
                RefusalReason.NO_KEY, f"this store is encrypted and has no key for tenant {record.tenant.hex()}"
            )
        return None

    def drafts(self, records: Sequence[Record], first: set[RecordName]) -> list[Draft]:
        """One draft a record; `first` names those that begin a chain."""
        works = self._keys is not None or any(self._compression.wants(record) for record in records)
        mapping = self._pool.map if works and len(records) > 1 else map
        return list(mapping(lambda record: self._draft(record, (record.kind, record.hash) in first), records))

    def _draft(self, record: Record, is_first: bool) -> Draft:
        now_ms = self._clock_ms()
        ttl_s = self._config.ttl_s(record.kind) if record.ttl_s is None else record.ttl_s
        coded = self._compression.encode(record)
        body = memoryview(record.payload if coded is None else coded).cast("B")
        header = RecordHeader(
            payload_checksum=bytes(16),
            hash=record.hash,
            parent=record.parent,
            fingerprint=record.fingerprint,
            segment=0,
            offset=0,
            stored_bytes=body.nbytes + (TAG_BYTES if self._keys else 0),
            payload_bytes=memoryview(record.payload).nbytes,
            position=record.position,
            created_ms=now_ms,
            expires_ms=now_ms + round(ttl_s * 1000) if ttl_s else 0,
            cost_us=max(0, round(record.cost_s * 1e6)),
            kind=record.kind,
            codec=Codec.RAW if coded is None else Codec.PLANES_ZSTD,
            flags=(RecordFlag.FIRST if is_first else RecordFlag.NONE)
            | (RecordFlag.ENCRYPTED if self._keys else RecordFlag.NONE)
            | (RecordFlag.ELSEWHERE if record.parent_elsewhere else RecordFlag.NONE),
            tenant=record.tenant,
            generation=record.generation,
            num_cards=record.labels.num_cards,
            hash_kind=record.labels.hash_kind,
            family=record.labels.family,
            salt=record.salt,
            mac=record.mac,
            version=record.version,
            nonce=fresh_nonce() if self._keys else bytes(NONCE_BYTES),
        )
        if self._keys is not None:
            body = memoryview(self._keys.encrypt(header, body))
        return Draft(header, body)
