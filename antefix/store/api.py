"""What a store can be asked, by workers, the router and operators' tools. Knows hashes and bytes, never tokens, tensors
or protobuf.
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
    """All that a store does for others. Same-host and remote clients implement it alike.

    tenant: the owner that the records must have (`Keyring.owner`); empty: any. Clients with the deployment's secret
    (`antefix.store_files.seal.Seals`) take sealed records only: what has no right seal is a miss.

    Every method may raise Unavailable or DeadlineExceeded; workers treat both as a miss and count them.
    """

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        """The longest stored prefix of `chain`. Never promises a block that a read would not find."""

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        """All that is stored of `chain`, or of any part of one, whether what lies before is stored here or not."""

    async def fate(self, hash: bytes, *, fingerprint: bytes) -> BlockFate:
        """What became of a block that was not found, to explain the miss."""

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        """Fill `into[i]` with block `hashes[i]`, checksum, own hash, fingerprint and seal verified.

        Returns the number of leading blocks that are right; buffers from there on hold garbage. A short count is
        a miss, not an error: a corrupt block has been quarantined and counted.
        """

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        """One verified payload, or None when it is not stored (any more) or was corrupt."""

    async def put(self, records: Sequence[Record]) -> PutResult:
        """Store records in order, durable when this returns (handoffs: in memory).

        A block whose parent is not stored is refused: the store stays prefix-closed.
        """

    async def reject(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        """Take it from the caller that these records, read right, hold what must not be used: they are misses until
        they are put again. Never raises: a store that cannot be told would give them again, to be rejected again.
        """

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        """Tell the store how a fingerprint's payloads are laid out, so that it can compress them.

        statement: what it stands for, `Fingerprint.statement`; empty: not told.
        """

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        """Keep an owner's records, and what they depend on, from eviction for a time; 0 lets go.

        Returns how many of them are stored.
        """

    async def evict(self, names: Sequence[RecordName], *, owner: bytes) -> int:
        """Drop an owner's records with all that depends on them, pinned or not. Returns how many went."""

    def watch(self, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
        """What is stored now, then every change, without gaps, until the stream breaks; or the changes since `cursor`.

        Breaking is Unavailable: watch again from the last batch's cursor.
        """

    async def stats(self) -> StoreTotals:
        """What it holds, and has done since it was opened."""

    async def close(self) -> None:
        """Let go of connections and files."""
