"""What a store holds: records and the answers about them. Knows hashes and bytes, never tokens, tensors or protobuf.

Kinds of records, each named by a hash:
    BLOCK       global KV of one block; its parent is the previous block's hash; kept for days.
    CHECKPOINT  window state at the boundary after that block; kept while it is likely to be used.
    HANDOFF     live state after `position` tokens, named by a request; short-lived, kept in memory only.
    POOLED      a checkpoint that is used within minutes or never; kept in memory only, named as on disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final

from antefix.block import NO_LABELS, Labels
from antefix.miss_reason import MissReason

# Anything with the buffer protocol whose bytes are contiguous; reads fill one, writes take one, without a copy.
Buffer = bytes | bytearray | memoryview


class RecordKind(IntEnum):
    """Values are part of the disk format: never renumber."""

    BLOCK = 1
    CHECKPOINT = 2
    HANDOFF = 3
    POOLED = 4
    # Of tiers that seal and ship segments; scans step over them (docs/FORMAT.md, "Kinds").
    STATEMENT = 5
    FOOTER = 6


# The kinds that the store writes to segments and names in its index, and those that its service keeps in memory.
STORED_KINDS: Final = (RecordKind.BLOCK, RecordKind.CHECKPOINT)
MEMORY_KINDS: Final = (RecordKind.HANDOFF, RecordKind.POOLED)
# A tenant's digest and its user's (`antefix.secret.Keyring.owner`).
OWNER_BYTES: Final = 24


# How a record is named where its fingerprint does not matter.
RecordName = tuple[RecordKind, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One thing to put. `parent` is the previous block's hash (the chain's root for the first block).

    position: tokens from the start to the end of the record.  ttl_s: None means the store's default for the kind.
    cost_s: what computing it took, which eviction weighs; 0 when unknown.
    tenant: whose it is: tenant and user digest.  generation, salt, mac: its seal (`antefix.store_files.seal`); 0: none.
    version: 1 makes a record of version 1, whose tenant is a name in UTF-8 and which has neither seal nor labels.
    parent_elsewhere: another store or tier may hold what it depends on, so it is stored without that as well.
    """

    kind: RecordKind
    hash: bytes
    parent: bytes
    fingerprint: bytes
    position: int
    payload: Buffer
    tenant: bytes = bytes(OWNER_BYTES)
    ttl_s: float | None = None
    cost_s: float = 0.0
    labels: Labels = NO_LABELS
    generation: int = 0
    salt: bytes = bytes(16)
    mac: bytes = bytes(16)
    version: int = 2
    parent_elsewhere: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupResult:
    """What is stored of a chain: blocks [0, num_blocks), and checkpoints after the named numbers of blocks.

    checkpoints: ascending, each at most num_blocks.  block_bytes: stored payload sizes' sum, before compression.
    tiers: where several stores are asked, labels of the nearest tier of each stretch, with the number of blocks at its
    end.  checkpoint_tiers: the same of each checkpoint. Empty: one store has all of it.
    """

    num_blocks: int
    checkpoints: tuple[int, ...] = ()
    block_bytes: int = 0
    tiers: tuple[tuple[int, str], ...] = ()
    checkpoint_tiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """All that a store or tier has of a chain, whether what lies before is there or not.

    spans: blocks [start, stop), ascending and apart.  checkpoints: after so many blocks, ascending.
    """

    spans: tuple[tuple[int, int], ...] = ()
    checkpoints: tuple[int, ...] = ()

    @classmethod
    def of_flags(cls, flags: Iterable[bool], checkpoints: Iterable[int] = ()) -> Held:
        """flags: of each block of the chain, whether it is there."""
        spans: list[tuple[int, int]] = []
        for index, there in enumerate(flags):
            if there and spans and spans[-1][1] == index:
                spans[-1] = (spans[-1][0], index + 1)
            elif there:
                spans.append((index, index + 1))
        return cls(spans=tuple(spans), checkpoints=tuple(checkpoints))

    @property
    def num_leading(self) -> int:
        """Blocks from the chain's beginning on."""
        return self.spans[0][1] if self.spans and self.spans[0][0] == 0 else 0

    @property
    def num_blocks(self) -> int:
        return sum(stop - start for start, stop in self.spans)


class RefusalReason(StrEnum):
    """Why a record was refused. Part of the protocol; a peer that does not know one treats it as OTHER."""

    OTHER = "other"
    # Malformed, or against a limit: no later try will succeed.
    INVALID = "invalid"
    # What it depends on is not stored, or was refused: put that again, or with it.
    NO_PARENT = "no_parent"
    FULL = "full"
    QUOTA = "quota"
    # An encrypted store without a key for the tenant. No later try will succeed before an operator acts.
    NO_KEY = "no_key"
    TOO_LARGE = "too_large"


@dataclass(frozen=True, slots=True)
class Refusal:
    """reason: for counters.  text: for people."""

    reason: RefusalReason
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class PutResult:
    """How many records were written, how many existed already, and the hashes refused, each with its reason."""

    num_stored: int
    num_existing: int
    refused: dict[bytes, Refusal] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFate:
    """What became of a block. reason: why it would miss; NONE while it is stored.

    fingerprints: all others under which the store has ever held something, the newest last.
    statements: what each of them stands for, as far as the store was told; empty where not.
    """

    reason: MissReason
    fingerprints: tuple[bytes, ...] = ()
    statements: tuple[bytes, ...] = ()
