"""What a store holds: records and the answers about them. Knows hashes and bytes, never tokens, tensors or protobuf.

Three kinds of records, each named by a block hash:
    BLOCK       global KV of one block; its parent is the previous block's hash; kept for days.
    CHECKPOINT  window state at the boundary after that block; kept while it is likely to be used.
    HANDOFF     live state after `position` tokens, named by a request; short-lived, kept in memory only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

# Anything with the buffer protocol whose bytes are contiguous; reads fill one, writes take one, without a copy.
Buffer = bytes | bytearray | memoryview


class RecordKind(IntEnum):
    """Values are part of the disk format: never renumber."""

    BLOCK = 1
    CHECKPOINT = 2
    HANDOFF = 3


# How a record is named where its fingerprint does not matter.
RecordName = tuple[RecordKind, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One thing to put. `parent` is the previous block's hash (the chain's root for the first block).

    position: tokens from the start to the end of the record.  ttl_s: None means the store's default for the kind.
    cost_s: what computing it took, which eviction weighs; 0 when unknown.
    """

    kind: RecordKind
    hash: bytes
    parent: bytes
    fingerprint: bytes
    position: int
    payload: Buffer
    tenant: str = ""
    ttl_s: float | None = None
    cost_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupResult:
    """What is stored of a chain: blocks [0, num_blocks), and checkpoints after the named numbers of blocks.

    checkpoints: ascending, each at most num_blocks.  block_bytes: stored payload sizes' sum, before compression.
    """

    num_blocks: int
    checkpoints: tuple[int, ...] = ()
    block_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PutResult:
    """How many records were written, how many existed already, and the hashes refused, each with its reason."""

    num_stored: int
    num_existing: int
    refused: dict[bytes, str] = field(default_factory=dict)


class Fate(StrEnum):
    """What became of a block. Values are those of a usage record's miss reasons where there is one."""

    STORED = "stored"
    # Never stored, or so long ago that the store has forgotten it.
    UNKNOWN = "unknown"
    EVICTED = "evicted"
    EXPIRED = "expired"
    CORRUPT = "corrupt"
    FINGERPRINT_DIFFERS = "fingerprint_differs"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFate:
    """fingerprints: all others under which the store has ever held something, the newest last."""

    fate: Fate
    fingerprints: tuple[bytes, ...] = ()
