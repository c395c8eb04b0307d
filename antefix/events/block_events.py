"""What events say: which blocks came and which went. Values alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

# Indexes know a block by this much of its hash: a wrong guess in 2^64 costs a placement that was not the best.
KEY_BYTES: Final = 8


class EventKind(IntEnum):
    """Values as in memory.proto and kvstore.proto, and in Redis."""

    # Of a later version: it has a number, and says nothing to this one.
    UNKNOWN = 0
    STORED = 1
    EVICTED = 2
    # A store's checkpoints; workers tell of blocks only.
    CHECKPOINTED = 3
    CHECKPOINT_EVICTED = 4

    @classmethod
    def _missing_(cls, value: object) -> EventKind:
        return cls.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEvent:
    """Blocks in a worker's memory, in order. keys: KEY_BYTES of each hash, one after the other."""

    kind: EventKind
    keys: bytes

    @property
    def num_blocks(self) -> int:
        return len(self.keys) // KEY_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreEvent:
    """Records of a store, of one kind and fingerprint. hashes: through Redis only the first KEY_BYTES of each."""

    kind: EventKind
    hashes: tuple[bytes, ...]
    fingerprint: bytes

    @property
    def num_blocks(self) -> int:
        return len(self.hashes)
