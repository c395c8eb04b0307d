"""What a store holds and what it can be asked. Knows hashes and bytes, never tokens, tensors or protobuf.

Three kinds of records, each named by a block hash:
    BLOCK       global KV of one block; its parent is the previous block's hash; kept for days.
    CHECKPOINT  window state at the boundary after that block; kept while it is likely to be used.
    HANDOFF     live state after `position` tokens, named by a request; short-lived, kept in memory only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Protocol

from antefix.layout import BlockLayout

# Anything with the buffer protocol whose bytes are contiguous; reads fill one, writes take one, without a copy.
Buffer = bytes | bytearray | memoryview


class RecordKind(IntEnum):
    """Values are part of the disk format: never renumber."""

    BLOCK = 1
    CHECKPOINT = 2
    HANDOFF = 3


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


class Store(Protocol):
    """The calls that workers and the router make. Same-host and remote clients implement it alike.

    Every method may raise Unavailable or DeadlineExceeded; workers treat both as a miss and count them.
    """

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: str = "") -> LookupResult:
        """The longest stored prefix of `chain`. Never promises a block that a read would not find."""

    async def fate(self, hash: bytes, *, fingerprint: bytes) -> BlockFate:
        """What became of a block that was not found, to explain the miss."""

    async def get_blocks(self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes) -> int:
        """Fill `into[i]` with block `hashes[i]`, checksum, own hash and fingerprint verified.

        Returns the number of leading blocks that are right; buffers from there on hold garbage. A short count is
        a miss, not an error: a corrupt block has been quarantined and counted.
        """

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes) -> bytes | None:
        """One verified payload, or None when it is not stored (any more) or was corrupt."""

    async def put(self, records: Sequence[Record]) -> PutResult:
        """Store records in order, durable when this returns (handoffs: in memory).

        A block whose parent is not stored is refused: the store stays prefix-closed.
        """

    async def register(self, fingerprint: bytes, layout: BlockLayout) -> None:
        """Tell the store how a fingerprint's payloads are laid out, so that it can compress them."""

    async def close(self) -> None: ...
