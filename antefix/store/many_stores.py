"""Several stores as one store: writes go to the nearest, reads come from any, nearest first. Knows hashes and bytes.

The combined store keeps the promises of `antefix.store.api.Store`, with one exception: its look-ups rely on the
stores' events, which arrive a moment late, and on the stores that answered in time. So a read may miss a block that a
look-up promised. A store that fails is not asked for a short time. A call fails only if no store answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Final

from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError, DeadlineExceeded, Unavailable
from antefix.events.block_events import BlockEvent
from antefix.events.numbered_log import Batch, Cursor
from antefix.layout import PayloadLayout
from antefix.located import Located
from antefix.miss_reason import MissReason
from antefix.record import (
    MEMORY_KINDS,
    BlockFate,
    Held,
    LookupResult,
    PutResult,
    Record,
    RecordKind,
    RecordName,
)
from antefix.store.local_copies import LocalCopies
from antefix.store.read_tiers import PrefixRead, Wanted, read_tiers
from antefix.store.record_source import RecordSource
from antefix.store.store_feed import StoreFeed
from antefix.store.store_members import Member, Members, nearest_of, union_of
from antefix.store.store_stats import StoreTotals
from antefix.store.tier import LoadedSource, Tier

log = logging.getLogger("antefix.store")

# The most informative reasons first: the block is stored, was stored once, was never stored.
_FATES: Final = (
    MissReason.NONE,
    MissReason.CORRUPT,
    MissReason.EVICTED,
    MissReason.EXPIRED,
    MissReason.ARITHMETIC_DIFFERS,
    MissReason.FINGERPRINT_DIFFERS,
)


# A service is ready when its tiers' indexes are loaded, or after this time. Then they load while it serves.
LOAD_S: Final = 10.0
# After this time, every read that began before a store left has ended or continues from another store.
_LET_GO_S: Final = 60.0


class ManyStores:
    """Used from one event loop."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        more: Sequence[Tier] = (),
        copies: LocalCopies | None = None,
        make_feed: Callable[[Member, bytes], StoreFeed] | None = None,
    ) -> None:
        """members: the stores, nearest first; `change` replaces them.  more: tiers that are read but not written.

        copies: copies records that are often read from other stores to the nearest one.
        make_feed: makes the feed that follows a member's events.
        """
        # Replaced by a new object when stores come or go. A call keeps the object it began with, because the numbers of
        # its tiers are only valid there.
        self.members = Members(members, more)
        self.copies: Final = copies
        self._more = tuple(more)
        self._make_feed = make_feed
        self._followed = b""
        self._layouts: dict[bytes, tuple[PayloadLayout, bytes]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """All tiers that can be read, such as stores, page caches and the object store."""
        return self.members.readable

    async def start(self) -> None:
        """Load the tiers' indexes, so that the first request can hit."""
        await asyncio.gather(*(_load(tier) for tier in self._more))

    def change(self, members: Sequence[Member]) -> None:
        """Use these stores from now on, nearest first. A store that leaves is closed once no read of this store can be
        running.

        Needs a running event loop.
        """
        going = [member for member in self.members.stores if member not in members]
        self.members = Members(members, self._more, before=self.members)
        if self._followed:
            self.follow(self._followed)
        for member in going:
            task = asyncio.create_task(_let_go(member))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    # --- what is there -------------------------------------------------------------------------------------------

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        """Which blocks and checkpoints of `chain` at least one store has."""
        found = await self.members.held(chain, fingerprint=fingerprint, tenant=tenant)
        return union_of(found.values(), len(chain))

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        """The longest prefix that the stores have together, with the nearest tier that has each part of it."""
        return (await self.locate(chain, fingerprint=fingerprint, tenant=tenant)).found

    async def locate(
        self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"", ask: bool = False
    ) -> Located:
        """As `lookup`, and also what each store has. ask: ask every store, even if its events tell what it has."""
        members = self.members
        held = await members.held(chain, fingerprint=fingerprint, tenant=tenant, ask=ask)
        parts = members.by_readable(held)
        order = members.nearest_first(parts)
        num_blocks = union_of(held.values(), len(chain)).num_leading
        checkpoints: dict[int, str] = {}
        for number in order:
            for block in parts[number].checkpoints:
                if block <= num_blocks:
                    checkpoints.setdefault(block, members.readable[number].label)
        found = LookupResult(
            num_blocks=num_blocks,
            checkpoints=tuple(sorted(checkpoints)),
            tiers=tuple((end, members.readable[number].label) for end, number in nearest_of(parts, order, num_blocks)),
            checkpoint_tiers=tuple(checkpoints[block] for block in sorted(checkpoints)),
        )
        by_name = {members.tiers[number].name: has for number, has in held.items()}
        return Located(chain=chain, fingerprint=fingerprint, held=by_name, found=found)

    async def fate(self, hash: bytes, *, fingerprint: bytes) -> BlockFate:
        """The most informative reason that any of the stores gives for missing a block."""
        fates = await self.members.of_all(lambda member: member.store.fate(hash, fingerprint=fingerprint))
        best = min((fate.reason for fate in fates), key=_rank_of)
        statements: dict[bytes, bytes] = {}
        for fate in fates:
            for other, said in zip(fate.fingerprints, fate.statements, strict=True):
                statements[other] = statements.get(other) or said
        return BlockFate(reason=best, fingerprints=tuple(statements), statements=tuple(statements.values()))

    # --- reading -------------------------------------------------------------------------------------------------

    async def read_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> PrefixRead:
        """As `get_blocks`, but returns also what each tier delivered and the errors of tiers that failed."""
        if not hashes:
            return PrefixRead()
        members = self.members
        held = await members.held(hashes, fingerprint=fingerprint, tenant=tenant)
        wanted = Wanted(hashes=hashes, into=into, fingerprint=fingerprint, tenant=tenant)
        found = await read_tiers(members.readable, members.by_readable(held), wanted)
        near = union_of((has for number, has in held.items() if members.is_near(number)), len(hashes))
        here = {block for start, stop in near.spans for block in range(start, stop)}
        far = [hashes[block] for block in range(found.num_good) if block not in here]
        self._note_read(RecordKind.BLOCK, far, fingerprint, tenant)
        return found

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        return (await self.read_blocks(hashes, into, fingerprint=fingerprint, tenant=tenant)).num_good

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        """Read one payload from the nearest tier that has it, skipping tiers that fail."""
        members = self.members

        async def read(tier: Tier) -> bytes | None:
            return await tier.source.get(kind, hash, fingerprint=fingerprint, tenant=tenant)

        numbers = [number for number in members.answering() if members.may_have(number, kind, hash, fingerprint)]
        if kind in MEMORY_KINDS:
            near = [number for number in numbers if members.is_near(number)]
            if found := await members.first_in_turn(near, read):
                return found[1]
            return await members.first_of_all([number for number in numbers if number not in near], read)
        found = await members.first_in_turn(members.nearest_first(numbers), read)
        if found is None:
            return None
        if not members.is_near(found[0]):
            self._note_read(kind, [hash], fingerprint, tenant)
        return found[1]

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """The leading ones of these records, with headers, from the other store or tier that has the most of them."""
        best: list[Record] = []
        members = self.members
        for number in members.nearest_first(members.answering()):
            source = members.tiers[number].source
            if members.is_near(number) or not isinstance(source, RecordSource):
                continue
            try:
                found = await source.get_records(kind, hashes, fingerprint=fingerprint, tenant=tenant)
            except AntefixError as err:
                members.tiers[number].failed(err)
                continue
            best = max(best, found, key=len)
            if len(best) == len(hashes):
                break
        return best

    # --- writing -------------------------------------------------------------------------------------------------

    async def put(self, records: Sequence[Record]) -> PutResult:
        """Write records to the nearest store that accepts them. The parents of the written records may be in another
        store.

        Raises:  Unavailable: no store accepts the records.
        """
        return await self._put(records, self._write_order(records))

    async def put_near(self, records: Sequence[Record]) -> PutResult:
        """As `put`, but the records are written only to near stores."""
        return await self._put(records, [member for member in self._write_order(records) if member.near])

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        """Register the layout of payloads with every store. A store that does not answer is told the layout before the
        first write to this store.
        """
        self._layouts[fingerprint] = (layout, statement)
        self.follow(fingerprint)
        tell = (self._register(member, fingerprint) for member in self.members.stores)
        answers = await asyncio.gather(*tell, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, AntefixError):
                raise answer

    def follow(self, fingerprint: bytes) -> None:
        """Follow the events of the stores that are not near, to know what they hold of this fingerprint."""
        is_other, self._followed = fingerprint != self._followed, fingerprint
        if self._make_feed is None:
            return
        for member in self.members.stores:
            if member.feed is not None:
                if is_other:
                    member.feed.rename(fingerprint)
            elif not member.near:
                member.feed = self._make_feed(member, fingerprint)
                member.feed.start()

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        """Pin records in each store that has them. Returns the largest number of the records that one store has."""
        return max(
            await self.members.of_all(lambda member: member.store.pin(names, duration_s=duration_s, owner=owner))
        )

    async def pin_prefix(self, chain: Sequence[bytes], *, fingerprint: bytes, duration_s: float, owner: bytes) -> int:
        """Pin a chain's blocks, and the checkpoint at its end, in every store that has part of them.

        Returns the number of leading blocks that are stored.
        """
        members = self.members
        found = await members.held(chain, fingerprint=fingerprint, tenant=owner)
        pins = []
        for number, member in enumerate(members.stores):
            held = found.get(number, Held())
            names = [(RecordKind.BLOCK, chain[stop - 1]) for _, stop in held.spans]
            names += [(RecordKind.CHECKPOINT, chain[-1])] * (len(chain) in held.checkpoints)
            if names:
                pins.append(member.store.pin(names, duration_s=duration_s, owner=owner))
        await asyncio.gather(*pins)
        return union_of(found.values(), len(chain)).num_leading

    async def reject(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        """Report the records to all stores, because this object does not know which store delivered them, and copies
        are bad as well.
        """

        async def tell(member: Member) -> int:
            await member.store.reject(kind, hashes)
            return 0

        await self.members.of_all(tell)

    async def evict(self, names: Sequence[RecordName], *, owner: bytes) -> int:
        """Delete records in all stores. Returns how many records were deleted."""
        return sum(await self.members.of_all(lambda member: member.store.evict(names, owner=owner)))

    def watch(self, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
        """The events of the nearest store, from which others learn its contents."""
        return self._nearest().store.watch(cursor)

    async def stats(self) -> StoreTotals:
        """The totals of the nearest store, which is the one that this process writes to."""
        return await self._nearest().store.stats()

    async def stats_by_store(self) -> dict[str, StoreTotals]:
        """The totals of each store that answers, by store name.  Raises:  AntefixError: no store answers."""

        async def ask(member: Member) -> tuple[str, StoreTotals]:
            return member.tier.name, await member.store.stats()

        return dict(await self.members.of_all(ask))

    @property
    def num_broken_seals(self) -> int:
        """How many records without this deployment's seal were read. All stores share one count."""
        return max((getattr(member.store, "num_broken_seals", 0) for member in self.members.stores), default=0)

    async def close(self) -> None:
        if self.copies is not None:
            await self.copies.close()
        await end_tasks(self._leaving)
        self.members.close()
        for member in self.members.stores:
            if member.feed is not None:
                await member.feed.close()
        await asyncio.gather(*(tier.source.close() for tier in self.members.tiers), return_exceptions=True)

    def _nearest(self) -> Member:
        """Raises:  Unavailable: no store is known now."""
        for member in self.members.near or self.members.stores:
            return member
        raise Unavailable("no store is known now")

    async def _put(self, records: Sequence[Record], order: Sequence[Member]) -> PutResult:
        if not records:
            return PutResult(num_stored=0, num_existing=0)
        apart = [each if each.kind in MEMORY_KINDS else replace(each, parent_elsewhere=True) for each in records]
        first_error: AntefixError | None = None
        for member in order:
            if member.tier.is_shunned and member is not order[0]:
                continue
            try:
                if records[0].fingerprint in self._layouts.keys() - member.registered:
                    await self._register(member, records[0].fingerprint)
                result = await member.store.put(apart)
            except (Unavailable, DeadlineExceeded) as err:
                member.tier.failed(err)
                first_error = first_error or err
                continue
            member.tier.answered()
            return result
        raise Unavailable(f"no store accepts records: {first_error or 'none is known now'}")

    def _write_order(self, records: Sequence[Record]) -> list[Member]:
        """The stores in the order in which a put tries them.

        The near stores (disks of one host) share the records by the hash of the first record's parent, so the records
        of one put go to one store.
        """
        parent = records[0].parent if records else b""
        members = self.members
        near = sorted(members.near, key=lambda each: (each.tier.is_shunned, _weight(each.tier.name, parent)))
        return [*near, *(member for member in members.stores if not member.near)]

    async def _register(self, member: Member, fingerprint: bytes) -> None:
        layout, statement = self._layouts[fingerprint]
        await member.store.register(fingerprint, layout, statement=statement)
        member.registered.add(fingerprint)

    def _note_read(self, kind: RecordKind, hashes: Sequence[bytes], fingerprint: bytes, tenant: bytes) -> None:
        if self.copies is not None and hashes:
            self.copies.note(self, kind, hashes, fingerprint=fingerprint, tenant=tenant)


async def _load(tier: Tier) -> None:
    if not isinstance(tier.source, LoadedSource):
        return
    try:
        async with asyncio.timeout(LOAD_S):
            await tier.source.load()
    except (AntefixError, TimeoutError) as err:
        log.warning(
            "the index of store %s is not loaded yet, so look-ups there find nothing for now: %s",
            tier.label,
            err or "loading takes long",
        )


async def _let_go(member: Member) -> None:
    if member.feed is not None:
        await member.feed.close()
    try:
        await asyncio.sleep(_LET_GO_S)
    finally:
        await member.store.close()


def _rank_of(reason: MissReason) -> int:
    return _FATES.index(reason) if reason in _FATES else len(_FATES)


def _weight(name: str, parent: bytes) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8, key=parent[:32]).digest()
