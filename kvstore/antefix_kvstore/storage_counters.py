"""Counters of a store's reads and writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StorageCounters:
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    payload_bytes_written: int = 0
    corrupt: int = 0
    forged: int = 0
    # Records with right checksums whose content is not valid numbers.
    unusable: int = 0
    refused: int = 0
    syncs: int = 0
    puts: int = 0
    # Records dropped because a call requested it.
    asked: int = 0
    # How often the index was rebuilt, or the store started empty, because its files were damaged.
    heals: int = 0
    # Malformed records, which no state of the store could accept. The worker that sends them gets no use of the cache.
    impossible: int = 0
    last_impossible: str = ""
