"""Window state that is useful for minutes only: handoffs and pooled checkpoints, kept in memory with a time to live and
a size limit in bytes.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from antefix.record import Record, RecordKind, Refusal, RefusalReason
from antefix.secret import TENANT_BYTES, USER_BYTES
from antefix.store_files.seal import sealed_part_of

TOO_LARGE: Final = Refusal(RefusalReason.TOO_LARGE, "larger than the memory for handoffs and pooled checkpoints")


@dataclass(frozen=True, slots=True)
class _Kept:
    payload: bytes
    sealed: bytes
    fingerprint: bytes
    expires_s: float
    owner: bytes = b""


class MemoryRecords:
    """Payloads by kind and hash. When the limit is reached, the oldest payloads are dropped. Used from one
    event loop.
    """

    def __init__(self, *, bytes_max: int, ttl_s: float) -> None:
        self.bytes_max = bytes_max
        self.nbytes = 0
        self._ttl_s = ttl_s
        # Payloads dropped since the start, by reason: space (to make room for a newer one), expired.
        self.num_dropped = {"space": 0, "expired": 0}
        self._kept: OrderedDict[tuple[RecordKind, bytes], _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def count(self, kind: RecordKind) -> tuple[int, int]:
        """The number of payloads of a kind, and the sum of their bytes."""
        found = [len(kept.payload) for (each, _), kept in self._kept.items() if each is kind]
        return len(found), sum(found)

    def put(self, record: Record) -> bool:
        """Keep a payload in memory, in place of one with the same name. Returns False if the payload alone exceeds the
        limit.
        """
        name = (record.kind, record.hash)
        self._drop(name)
        nbytes = memoryview(record.payload).nbytes
        if nbytes > self.bytes_max:
            return False
        self.expire()
        while self._kept and self.nbytes + nbytes > self.bytes_max:
            self._drop(next(iter(self._kept)))
            self.num_dropped["space"] += 1
        ttl_s = self._ttl_s if record.ttl_s is None else record.ttl_s
        expires_s = time.monotonic() + ttl_s if ttl_s else float("inf")
        self._kept[name] = _Kept(
            bytes(record.payload), sealed_part_of(record), record.fingerprint, expires_s, record.tenant
        )
        self.nbytes += nbytes
        return True

    def get(
        self, kind: RecordKind, name: bytes, fingerprint: bytes, *, owners: Collection[bytes] | None = None
    ) -> tuple[bytes, bytes] | None:
        """A payload and its sealed part. owners: the owners that it may belong to; None: any owner."""
        kept = self._kept.get((kind, name))
        if kept is None or kept.fingerprint != fingerprint or kept.expires_s <= time.monotonic():
            return None
        return (kept.payload, kept.sealed) if owners is None or kept.owner in owners else None

    def is_others(self, kind: RecordKind, name: bytes, owner: bytes) -> bool:
        """Whether another owner has put a record of this name, which this owner must not replace."""
        kept = self._kept.get((kind, name))
        return kept is not None and kept.owner != owner and kept.expires_s > time.monotonic()

    def purge(self, owner: bytes) -> int:
        """Drop an owner's payloads; if the owner names no user, those of the whole tenant. Returns how many were
        dropped.
        """
        account = owner[:TENANT_BYTES] if owner.endswith(bytes(USER_BYTES)) else owner
        names = [name for name, kept in self._kept.items() if kept.owner.startswith(account)]
        for name in names:
            self._drop(name)
        return len(names)

    def expire(self) -> None:
        now_s = time.monotonic()
        for name in [name for name, kept in self._kept.items() if kept.expires_s <= now_s]:
            self._drop(name)
            self.num_dropped["expired"] += 1

    def _drop(self, name: tuple[RecordKind, bytes]) -> None:
        kept = self._kept.pop(name, None)
        if kept is not None:
            self.nbytes -= len(kept.payload)
