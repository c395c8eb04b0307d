"""The records that a store holds, and a store's answers about records. This module knows hashes and bytes, never
tokens, tensors or protobuf.

Kinds of records, each named by a hash:
    BLOCK       global KV of one block; its parent is the previous block's hash; kept for days.
    CHECKPOINT  window state at the boundary after that block; kept while it is likely to be used.
    HANDOFF     live state after `position` tokens, named by a request; short-lived, kept in memory only.
    POOLED      a checkpoint that is used within minutes or never; kept in memory only, named like a CHECKPOINT.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final

from antefix.block import NO_LABELS, Labels
from antefix.miss_reason import MissReason

# Any contiguous object with the buffer protocol. Reads fill buffers and writes take them, without a copy.
Buffer = bytes | bytearray | memoryview


class RecordKind(IntEnum):
    """The kind of a record. The values of this enum are part of the disk format, so they must never be renumbered."""

    BLOCK = 1
    CHECKPOINT = 2
    HANDOFF = 3
    POOLED = 4
    # Kinds in segments of the object tier; scans of a store skip them (docs/FORMAT.md, "Kinds").
    STATEMENT = 5
    FOOTER = 6


# The kinds that the store writes to segments and lists in its index, and the kinds that its service keeps in memory.
STORED_KINDS: Final = (RecordKind.BLOCK, RecordKind.CHECKPOINT)
MEMORY_KINDS: Final = (RecordKind.HANDOFF, RecordKind.POOLED)
# A tenant's digest and its user's digest together (`antefix.secret.Keyring.owner`).
OWNER_BYTES: Final = 24


# A record's name without its fingerprint.
RecordName = tuple[RecordKind, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record to put. `parent` is the previous block's hash (the chain's root for the first block).

    position: tokens from the start to the end of the record.  ttl_s: None means the store's default for the kind.
    cost_s: seconds that computing the record took, which eviction weighs; 0: unknown.
    tenant: the owner, as tenant digest and user digest.  generation, salt, mac: the record's seal
    (`antefix.store_files.seal`); generation 0: no seal.
    version: 1 makes a record of version 1, whose tenant is a name in UTF-8 and which has neither seal nor labels.
    parent_elsewhere: the parent may be in another store or tier, so the store accepts the record without its parent.
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
    """What is stored of a chain: blocks [0, num_blocks) and some checkpoints.

    checkpoints: after how many blocks each checkpoint lies; ascending, each at most num_blocks.
    block_bytes: the total payload size of the blocks, before compression.
    tiers: if several stores were asked, for each stretch the number of blocks at its end and the label of the nearest
    tier that has it.  checkpoint_tiers: the label for each checkpoint. Empty: one store has everything.
    """

    num_blocks: int
    checkpoints: tuple[int, ...] = ()
    block_bytes: int = 0
    tiers: tuple[tuple[int, str], ...] = ()
    checkpoint_tiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Everything that a store or tier has of a chain, including blocks whose predecessors it lacks.

    spans: blocks [start, stop), ascending, with gaps between them.
    checkpoints: after how many blocks each checkpoint lies, ascending.
    cached, cached_checkpoints: the part of both that was in the page cache of the store's host, by samples; None: not
    known. The cached part changes at any time, so it does not count when two objects are compared.
    """

    spans: tuple[tuple[int, int], ...] = ()
    checkpoints: tuple[int, ...] = ()
    cached: tuple[tuple[int, int], ...] | None = field(default=None, compare=False)
    cached_checkpoints: tuple[int, ...] = field(default=(), compare=False)

    @classmethod
    def of_flags(cls, flags: Iterable[bool], checkpoints: Iterable[int] = ()) -> Held:
        """flags: for each block of the chain, whether it is stored."""
        spans: list[tuple[int, int]] = []
        for index, there in enumerate(flags):
            if there and spans and spans[-1][1] == index:
                spans[-1] = (spans[-1][0], index + 1)
            elif there:
                spans.append((index, index + 1))
        return cls(spans=tuple(spans), checkpoints=tuple(checkpoints))

    @property
    def num_leading(self) -> int:
        """How many blocks are stored from the chain's beginning on, without a gap."""
        return self.spans[0][1] if self.spans and self.spans[0][0] == 0 else 0

    @property
    def num_blocks(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def num_cached(self) -> int:
        return sum(stop - start for start, stop in self.cached or ())

    def parted(self) -> tuple[Held, Held]:
        """The bytes that must come from the disk, and the bytes that are in the page cache. No block is in both
        parts.
        """
        cached = Held(spans=self.cached or (), checkpoints=self.cached_checkpoints)
        checkpoints = tuple(count for count in self.checkpoints if count not in self.cached_checkpoints)
        return Held(spans=_without(self.spans, cached.spans), checkpoints=checkpoints), cached


def _without(spans: Sequence[tuple[int, int]], parts: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The spans without their `parts`. Both lists are ascending; spans have gaps between them."""
    left: list[tuple[int, int]] = []
    for start, stop in spans:
        for first, last in parts:
            if start < last and first < stop:
                if start < first:
                    left.append((start, first))
                start = max(start, last)
        if start < stop:
            left.append((start, stop))
    return tuple(left)


class RefusalReason(StrEnum):
    """Why a record was refused. The reasons are part of the protocol: a peer treats a reason that it does not know as
    OTHER.
    """

    OTHER = "other"
    # The record is malformed or exceeds a limit, so no retry will succeed.
    INVALID = "invalid"
    # The record's parent is not stored, or was refused. Put the parent again, before the record or together with it.
    NO_PARENT = "no_parent"
    FULL = "full"
    QUOTA = "quota"
    # The store is encrypted and has no key for the tenant. No retry will succeed until an operator adds a key.
    NO_KEY = "no_key"
    TOO_LARGE = "too_large"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refused record.  reason: used by counters.  text: an explanation for people."""

    reason: RefusalReason
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class PutResult:
    """How many records were written, how many existed already, and the hashes of refused records, each with its
    reason.
    """

    num_stored: int
    num_existing: int
    refused: dict[bytes, Refusal] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFate:
    """Why a store would not have a block. reason: NONE if the block is stored.

    fingerprints: all other fingerprints under which the store has ever held records, the newest last.
    statements: the statement of each of these fingerprints; empty if the store was not given it.
    """

    reason: MissReason
    fingerprints: tuple[bytes, ...] = ()
    statements: tuple[bytes, ...] = ()
