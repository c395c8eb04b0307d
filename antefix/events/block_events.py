"""Events about blocks: which blocks a worker or store has gained, and which it has lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from antefix.block import HASH_BYTES

# Indexes keep this many bytes of a block's hash. A collision (one in 2^64) only makes a placement less good.
KEY_BYTES: Final = 8


Key = int


def keys_of(hashes: Sequence[bytes]) -> list[Key]:
    """The keys of blocks in indexes: the first 8 bytes of their hashes."""
    if not hashes:
        return []
    words = len(hashes[0]) // KEY_BYTES
    keys: list[Key] = np.frombuffer(b"".join(hashes), "<u8")[::words].tolist()
    return keys


class EventKind(IntEnum):
    """Values as in memory.proto and kvstore.proto, and in Redis."""

    # A kind of a later version. The event counts for the numbering but is otherwise ignored.
    UNKNOWN = 0
    STORED = 1
    EVICTED = 2
    # Checkpoints that a store has gained. Workers report blocks only.
    CHECKPOINTED = 3
    CHECKPOINT_EVICTED = 4

    @classmethod
    def _missing_(cls, value: object) -> EventKind:
        return cls.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEvent:
    """Blocks or checkpoints, in the order in which they were stored or removed.

    hashes: the hashes, concatenated; each has `hash_bytes` bytes, at least KEY_BYTES. fingerprint: the fingerprint of
    all these blocks; empty if the source has only one.
    """

    kind: EventKind
    hashes: bytes
    hash_bytes: int = KEY_BYTES
    fingerprint: bytes = b""

    @classmethod
    def of(cls, kind: EventKind, hashes: Iterable[bytes], fingerprint: bytes) -> BlockEvent:
        """An event about the blocks with these complete hashes."""
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
        """The blocks' keys in indexes."""
        return np.frombuffer(self.hashes, "<u8")[:: self.hash_bytes // KEY_BYTES]
