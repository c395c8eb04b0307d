"""What an event says: which blocks came to a place, and which went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from antefix.block import HASH_BYTES

# Indexes know a block by this much of its hash: a wrong guess in 2^64 costs a placement that was not the best.
KEY_BYTES: Final = 8


Key = int


def keys_of(hashes: Sequence[bytes]) -> list[Key]:
    """Indexes' names of blocks: the first 8 bytes of their hashes."""
    if not hashes:
        return []
    words = len(hashes[0]) // KEY_BYTES
    keys: list[Key] = np.frombuffer(b"".join(hashes), "<u8")[::words].tolist()
    return keys


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
class BlockEvent:
    """Blocks or checkpoints, in the order of their coming or going.

    hashes: one after the other; of each at least the first KEY_BYTES, as `hash_bytes` says.
    fingerprint: of all of them; empty where the source has one only.
    """

    kind: EventKind
    hashes: bytes
    hash_bytes: int = KEY_BYTES
    fingerprint: bytes = b""

    @classmethod
    def of(cls, kind: EventKind, hashes: Iterable[bytes], fingerprint: bytes) -> BlockEvent:
        """Of whole hashes."""
        return cls(kind=kind, hashes=b"".join(hashes), hash_bytes=HASH_BYTES, fingerprint=fingerprint)

    @property
    def is_whole(self) -> bool:
        return len(self.hashes) % self.hash_bytes == 0

    @property
    def num_blocks(self) -> int:
        return len(self.hashes) // self.hash_bytes

    def names(self) -> list[bytes]:
        return [self.hashes[at : at + self.hash_bytes] for at in range(0, len(self.hashes), self.hash_bytes)]

    def keys(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """What indexes know the blocks by."""
        return np.frombuffer(self.hashes, "<u8")[:: self.hash_bytes // KEY_BYTES]
