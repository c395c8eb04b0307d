"""Which payloads are compressed. Holds the plane plans that clients registered; the codec is antefix.store.codec."""

from __future__ import annotations

import threading

from antefix.store import codec
from antefix.store.api import Record, RecordKind


class Compression:
    """`mode`: off, zstd (keep what is smaller) or auto. Thread-safe."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._lock = threading.Lock()
        self._plans: dict[bytes, codec.PlanePlan] = {}

    def register(self, fingerprint: bytes, plan: codec.PlanePlan) -> None:
        with self._lock:
            self._plans[fingerprint] = plan

    def encode(self, record: Record) -> bytes | None:
        """The coded payload, or None where it is stored raw."""
        if self.mode == "off" or record.kind is not RecordKind.BLOCK:
            return None
        plan = self._plans.get(record.fingerprint)
        return None if plan is None else codec.encode(record.payload, plan)
