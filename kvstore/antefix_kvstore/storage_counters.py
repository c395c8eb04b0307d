"""What a store counts of its reads and writes."""

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
    # Of right bytes that stand for no numbers.
    unusable: int = 0
    refused: int = 0
    syncs: int = 0
    puts: int = 0
    # Dropped because a call asked for it.
    asked: int = 0
    # How often the index was made again, or the store begun again, because its files were harmed.
    heals: int = 0
    # Malformed, so that no state of the store could take them: their sender is not served by the cache at all.
    impossible: int = 0
    last_impossible: str = ""
