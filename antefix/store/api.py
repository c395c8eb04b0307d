"""The calls that workers, the router and operators' tools make to a store. The interface knows hashes and bytes, never
tokens, tensors or protobuf.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from antefix.events.block_events import BlockEvent
from antefix.events.numbered_log import Batch, Cursor
from antefix.layout import PayloadLayout
from antefix.record import BlockFate, Held, LookupResult, PutResult, Record, RecordKind, RecordName
from antefix.store.store_stats import StoreTotals


class Store(Protocol):
    """The interface of a store. Clients on the same host and remote clients implement all of these calls.

    tenant: the owner that the records must have (`Keyring.owner`); empty: any owner. Clients with the deployment's
    secret (`antefix.store_files.seal.Seals`) accept sealed records only: a record without a valid seal is a miss.

    Every method may raise Unavailable or DeadlineExceeded; workers treat either error as a cache miss and count it.
    """

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        """The longest stored prefix of `chain`. The answer never promises a block that a read would not find."""

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        """Which blocks and checkpoints of `chain` are stored. `chain` may be any part of a chain; the blocks before it
        need not be stored here.
        """

    async def fate(self, hash: bytes, *, fingerprint: bytes) -> BlockFate:
        """Why a block was not found (evicted, expired, never stored, ...), to explain the miss."""

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        """Fill `into[i]` with block `hashes[i]`, after checking its checksum, hash, fingerprint and seal.

        Returns the number of leading blocks that passed all checks; the buffers after them hold garbage. A number
        below `len(hashes)` is a miss, not an error: a corrupt block has been quarantined and counted.
        """

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        """One verified payload. None: the payload was never stored, was evicted, or is corrupt."""

    async def put(self, records: Sequence[Record]) -> PutResult:
        """Store records in order. When this call returns, the records are durable, except handoffs, which are kept only
        in memory.

        A block whose parent is not stored is refused, so that every stored block has all blocks before it.
        """

    async def reject(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        """Tell the store that the caller found the content of these records unusable, although their checksums are
        right. The reported records are misses until they are put again. Reporting never raises: if the call does not
        reach the store, the store returns the same records again and the caller rejects them again.
        """

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        """Tell the store how a fingerprint's payloads are laid out, so that it can compress them.

        statement: `Fingerprint.statement`, the values that the fingerprint was hashed from; empty if they are not
        known.
        """

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        """Protect an owner's records, and the records that they depend on, from eviction for `duration_s`; 0 unpins.

        Returns how many of the named records are stored.
        """

    async def evict(self, names: Sequence[RecordName], *, owner: bytes) -> int:
        """Delete an owner's records and all records that depend on them, even pinned ones.

        Returns how many records were deleted.
        """

    def watch(self, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
        """Events without gaps until the stream breaks: the changes since `cursor`, or without a cursor all that is
        stored now and then every change.

        A broken stream raises Unavailable: call `watch` again with the last batch's cursor.
        """

    async def stats(self) -> StoreTotals:
        """What the store holds now, and its counters since it was opened."""

    async def close(self) -> None:
        """Close connections and files."""
