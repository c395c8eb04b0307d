"""The stores and tiers behind `ManyStores`. `ManyStores` asks all of them at once, with a time limit, skipping failed
ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from antefix.errors import AntefixError, DeadlineExceeded, Unavailable
from antefix.located import told
from antefix.record import MEMORY_KINDS, Held, RecordKind
from antefix.store.api import Store
from antefix.store.store_feed import StoreFeed
from antefix.store.tier import Tier

T = TypeVar("T")
# A late answer is still accepted until this long after the time limit.
_LATE_S_MAX: Final = 10.0
# How many late questions to one tier stay open. A further question is cancelled when it is late.
_NUM_LATE_MAX: Final = 32
# If this process's event loop was delayed by more than this, the answer may be there but not read yet.
_OWN_DELAY_S: Final = 0.05


@dataclass(slots=True, eq=False)
class Member:
    """One of the stores.

    near: whether records are written to this store. feed: knows from events which records the store holds; None: the
    store is asked. registered: fingerprints whose layouts were registered with the store. address: of the store's
    service; empty: not known. page_cache: the tier of its records that are in this host's page cache; None: its files
    are not read here.
    """

    tier: Tier
    store: Store
    address: str = ""
    near: bool = False
    feed: StoreFeed | None = None
    registered: set[bytes] = field(default_factory=set)
    page_cache: Tier | None = None


class Members:
    """All tiers, by number: first the stores, in the order of `members`, then the tiers that are only read.

    After these tiers, only `readable` also has the page caches of stores whose files are read here. A page cache is not
    asked which records it has, because its store reports them. The speeds of reads from the page cache are measured
    apart from those of the disk.
    """

    def __init__(self, members: Sequence[Member], more: Sequence[Tier] = (), *, before: Members | None = None) -> None:
        """before: the object that this one replaces; late answers to that object still update the tiers' speeds."""
        self.stores: Final = tuple(members)
        self.tiers: Final = (*(member.tier for member in members), *more)
        caches = {number: each.page_cache for number, each in enumerate(members) if each.page_cache is not None}
        self.readable: Final = (*self.tiers, *caches.values())
        self._cache_of: Final = {number: len(self.tiers) + place for place, number in enumerate(caches)}
        self.near: Final = tuple(member for member in members if member.near)
        self._late: dict[asyncio.Task[Held], Tier] = before._late if before is not None else {}

    def is_near(self, number: int) -> bool:
        return number < len(self.stores) and self.stores[number].near

    def by_readable(self, found: Mapping[int, Held]) -> dict[int, Held]:
        """Which blocks each readable tier has. found: which blocks each tier has, with page caches counted in their
        stores.
        """
        parted = dict(found)
        for number, cache in self._cache_of.items():
            if number in parted and parted[number].cached is not None:
                parted[number], parted[cache] = parted[number].parted()
        return parted

    def feed(self, number: int) -> StoreFeed | None:
        return self.stores[number].feed if number < len(self.stores) else None

    def nearest_first(self, numbers: Iterable[int]) -> list[int]:
        """The numbers of readable tiers in the order in which they should be read."""
        near = {number for number in range(len(self.stores)) if self.is_near(number)}
        near |= {cache for number, cache in self._cache_of.items() if number in near}
        return sorted(numbers, key=lambda number: (number not in near, self.readable[number].speed.predicted_s(0)))

    def answering(self) -> list[int]:
        return [number for number, tier in enumerate(self.tiers) if not tier.is_shunned]

    async def held(
        self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes, ask: bool = False
    ) -> dict[int, Held]:
        """Which blocks each tier has, by the tier's number, without tiers that failed.

        ask: ask every tier, even where events or a router's call say what it has, which may be a moment old.
        Raises:  Unavailable: no tier answers.  AntefixError: the tiers that answer refuse the question.
        """
        numbers = self.answering()
        answers = await asyncio.gather(*(self._held(number, chain, fingerprint, tenant, ask) for number in numbers))
        found = {number: held for number, held in zip(numbers, answers, strict=True) if isinstance(held, Held)}
        if not found:
            # A refusal from a store that answers tells more than the silence of another store.
            errors = [each for each in answers if isinstance(each, AntefixError) and not isinstance(each, Unavailable)]
            raise errors[0] if errors else Unavailable("none of the stores answers")
        return found

    async def _held(
        self, number: int, chain: Sequence[bytes], fingerprint: bytes, tenant: bytes, ask: bool
    ) -> Held | AntefixError | TimeoutError:
        if not ask and (known := self._known(number, chain, fingerprint)) is not None:
            return known
        tier = self.tiers[number]
        question = tier.source.held(chain, fingerprint=fingerprint, tenant=tenant)
        return await self._in_time(tier, asyncio.create_task(question))

    async def _in_time(self, tier: Tier, asked: asyncio.Task[Held]) -> Held | AntefixError | TimeoutError:
        """The tier's answer, if it comes within the tier's time limit. An answer that comes later still updates the
        tier's answer times.
        """
        begun_s, limit_s = tier.clock(), tier.standing.limit_s
        try:
            await asyncio.wait({asked}, timeout=limit_s)
            if not asked.done() and tier.clock() - begun_s > limit_s + _OWN_DELAY_S:
                await asyncio.wait({asked}, timeout=_OWN_DELAY_S)
        except asyncio.CancelledError:
            asked.cancel()
            raise
        if asked.done():
            return _settled(tier, asked, begun_s)
        tier.late(begun_s)
        self._await_late(tier, asked, begun_s)
        return TimeoutError(f"{tier.label} did not say within {limit_s:.1f} s which blocks it has")

    def _await_late(self, tier: Tier, asked: asyncio.Task[Held], begun_s: float) -> None:
        if sum(late is tier for late in self._late.values()) >= _NUM_LATE_MAX:
            asked.cancel()
            return
        ends = asyncio.get_running_loop().call_later(_LATE_S_MAX, asked.cancel)
        self._late[asked] = tier

        def over(_: asyncio.Task[Held]) -> None:
            ends.cancel()
            del self._late[asked]
            # `tier.late` has already recorded that the answer took too long.
            if not asked.cancelled() and not isinstance(asked.exception(), DeadlineExceeded):
                _settled(tier, asked, begun_s)

        asked.add_done_callback(over)

    def close(self) -> None:
        """Cancel the questions whose answers are late."""
        for asked in self._late:
            asked.cancel()

    def _known(self, number: int, hashes: Sequence[bytes], fingerprint: bytes) -> Held | None:
        """Which blocks a store has according to its events or to this call's router; None if neither tells, so that the
        store must be asked. A tier that is only read has its index in this process, which reads look into in any case,
        and the router's index of it may be older.
        """
        feed = self.feed(number)
        if feed is not None and (known := feed.held(hashes, fingerprint=fingerprint)) is not None:
            return known
        located = told()
        if located is None or self.is_near(number) or number >= len(self.stores):
            return None
        return located.of(self.tiers[number].name, hashes, fingerprint)

    def may_have(self, number: int, kind: RecordKind, hash: bytes, fingerprint: bytes) -> bool:
        """Whether a tier should be asked for a record. Events of a store do not cover records in memory, so any store
        may have those.
        """
        known = None if kind in MEMORY_KINDS else self._known(number, [hash], fingerprint)
        if known is None:
            return True
        return bool(known.spans if kind is RecordKind.BLOCK else known.checkpoints)

    async def first_in_turn(
        self, numbers: Sequence[int], read: Callable[[Tier], Awaitable[bytes | None]]
    ) -> tuple[int, bytes] | None:
        """Ask these tiers for the payload, one after another. Returns the first tier that has the payload, and the
        payload; failed tiers are skipped.
        """
        for number in numbers:
            payload = await self._try(number, read)
            if payload is not None:
                return number, payload
        return None

    async def first_of_all(
        self, numbers: Sequence[int], read: Callable[[Tier], Awaitable[bytes | None]]
    ) -> bytes | None:
        """Ask all these tiers at once, for a record that one store has in memory. Nobody knows beforehand which store
        has the record.
        """
        asked = [asyncio.ensure_future(self._try(number, read)) for number in numbers]
        try:
            for answer in asyncio.as_completed(asked):
                payload = await answer
                if payload is not None:
                    return payload
            return None
        finally:
            for task in asked:
                task.cancel()

    async def _try(self, number: int, read: Callable[[Tier], Awaitable[bytes | None]]) -> bytes | None:
        tier = self.tiers[number]
        try:
            payload = await read(tier)
        except AntefixError as err:
            tier.failed(err)
            return None
        tier.answered()
        return payload

    async def of_all(self, call: Callable[[Member], Awaitable[T]]) -> list[T]:
        """The results of a call to every store, from the stores that answer. Raises: AntefixError: no store answers."""
        asked = [member for member in self.stores if not member.tier.is_shunned] or list(self.stores)
        if not asked:
            raise Unavailable("no store is known now")
        answers = await asyncio.gather(*(call(member) for member in asked), return_exceptions=True)
        good: list[T] = []
        errors: list[AntefixError] = []
        for member, answer in zip(asked, answers, strict=True):
            if isinstance(answer, AntefixError):
                member.tier.failed(answer)
                errors.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                good.append(answer)
        if not good:
            raise errors[0]
        return good


def _settled(tier: Tier, asked: asyncio.Task[Held], begun_s: float) -> Held | AntefixError | TimeoutError:
    """The tier's answer or error. An answer of a tier also updates the tier's standing."""
    err = asked.exception()
    if err is None:
        tier.standing.answered(tier.clock() - begun_s)
        return asked.result()
    if not isinstance(err, AntefixError):
        raise err
    if isinstance(err, DeadlineExceeded):
        tier.late(begun_s)
    else:
        tier.failed(err)
    return err


def union_of(parts: Iterable[Held], num_blocks: int) -> Held:
    """Which parts of a chain of `num_blocks` blocks these tiers have together."""
    flags = [False] * num_blocks
    checkpoints: set[int] = set()
    for held in parts:
        checkpoints.update(held.checkpoints)
        for start, stop in held.spans:
            flags[start:stop] = [True] * (min(stop, num_blocks) - start)
    return Held.of_flags(flags, sorted(checkpoints))


def nearest_of(found: Mapping[int, Held], order: Sequence[int], num_blocks: int) -> list[tuple[int, int]]:
    """Cut a prefix that the tiers have together into stretches, each with the first tier in `order` that has it.

    Returns (end of the stretch, tier number) for each.
    """
    tiers = [-1] * num_blocks
    for number in order:
        for start, stop in found[number].spans:
            for block in range(start, min(stop, num_blocks)):
                tiers[block] = number if tiers[block] < 0 else tiers[block]
    ends = [end for end in range(1, num_blocks + 1) if end == num_blocks or tiers[end - 1] != tiers[end]]
    return [(end, tiers[end - 1]) for end in ends]
