"""Reads a prefix from several tiers at once: each part from the fastest tier, and from another tier if the first one
fails.

The prefix ends at the first block that no tier delivers. Bytes that fail a check are never counted. A read that takes
several times as long as predicted is given up if another tier has the same blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from antefix.errors import AntefixError, DeadlineExceeded
from antefix.record import Held
from antefix.store.file_reads import ReadHangs
from antefix.store.read_shares import Piece, Shares, pieces_of
from antefix.store.tier import Tier, TierRead

# Reads in flight per tier, so that the next read has begun when one ends.
IN_FLIGHT: Final = 2
# A read is late after this many times its predicted time, plus a number of seconds. Late reads are given up at once if
# another tier has the same blocks, and later if none has.
_LATE: Final = 4.0
_LATE_S: Final = 0.5
_ALONE: Final = 20.0
_ALONE_S: Final = 10.0


@dataclass(slots=True)
class PrefixRead:
    """num_good: the number of leading blocks that were read and verified.

    reads: how many of the blocks each tier delivered. errors: the errors of tiers that failed.
    """

    num_good: int = 0
    reads: list[TierRead] = field(default_factory=list)
    errors: list[AntefixError] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The blocks to read, and a buffer for each. All buffers have the same size.  tenant: as in `api.Store`."""

    hashes: Sequence[bytes]
    into: Sequence[memoryview]
    fingerprint: bytes
    tenant: bytes = b""

    @property
    def block_bytes(self) -> int:
        return self.into[0].nbytes if self.into else 0


async def read_tiers(tiers: Sequence[Tier], held: Mapping[int, Held], wanted: Wanted) -> PrefixRead:
    """Read the wanted blocks.

    held: which blocks each tier should have, by the tier's number. A block that the tier lacks is read from another
    tier, or ends the prefix.

    After this call has returned, was cancelled or raised anything but ReadHangs, no thread writes to the buffers.
    """
    return await _Reading(tiers, held, wanted).run()


class _Late(DeadlineExceeded):
    """A tier that was too slow has been given up in favour of another tier. If the other tier fails too, the slow tier
    is asked again.
    """

    def __init__(self, message: str, begun_s: float) -> None:
        super().__init__(message)
        self.begun_s = begun_s


class _Reading:
    def __init__(self, tiers: Sequence[Tier], held: Mapping[int, Held], wanted: Wanted) -> None:
        self._tiers = tiers
        self._wanted = wanted
        self._pieces = pieces_of(held, len(wanted.hashes), wanted.block_bytes)
        self._shares = Shares(lambda tier, nbytes: tiers[tier].speed.predicted_s(nbytes), wanted.block_bytes)
        self._limit = self._pieces[-1].stop if self._pieces else 0
        self._running: dict[asyncio.Task[int], tuple[int, Piece]] = {}
        self._failed: frozenset[int] = frozenset()
        self._given: list[tuple[int, Piece]] = []
        # For each tier: when its first read began and when its last read ended.
        self._times: dict[int, tuple[float, float]] = {}
        self._errors: list[AntefixError] = []
        self._hanging: list[ReadHangs] = []

    async def run(self) -> PrefixRead:
        self._shares.give(self._pieces)
        try:
            self._start_reads()
            while self._running:
                done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    tier, piece = self._running.pop(task)
                    if not task.cancelled():
                        self._settle(tier, piece, task)
                self._start_reads()
        finally:
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running)
                self._hanging += [err for task in self._running if isinstance(err := _error_of(task), ReadHangs)]
        if self._hanging:
            raise ReadHangs(str(self._hanging[0]), [work for each in self._hanging for work in each.works])
        reads = self._by_tier()
        return PrefixRead(num_good=self._limit, reads=reads, errors=self._errors)

    def _start_reads(self) -> None:
        for tier in range(len(self._tiers)):
            num_running = sum(number == tier for number, _ in self._running.values())
            while num_running < IN_FLIGHT and (piece := self._shares.take(tier)) is not None:
                task = asyncio.create_task(self._read(tier, piece))
                self._running[task] = (tier, piece)
                num_running += 1

    async def _read(self, number: int, piece: Piece) -> int:
        tier, wanted = self._tiers[number], self._wanted
        nbytes = piece.num_blocks * wanted.block_bytes
        predicted_s = IN_FLIGHT * tier.speed.predicted_s(nbytes)
        has_other = self._has_other(number, piece)
        limit_s = predicted_s * _LATE + _LATE_S if has_other else predicted_s * _ALONE + _ALONE_S
        started, begun_s = time.perf_counter(), tier.clock()
        try:
            async with asyncio.timeout(limit_s):
                num_good = await tier.source.get_blocks(
                    wanted.hashes[piece.start : piece.stop],
                    wanted.into[piece.start : piece.stop],
                    fingerprint=wanted.fingerprint,
                    tenant=wanted.tenant,
                )
        except TimeoutError as err:
            text = f"{tier.label} took longer than {limit_s:.1f} s for {nbytes} bytes"
            raise _Late(text, begun_s) if has_other else DeadlineExceeded(text) from err
        if num_good:
            self._given.append((number, replace(piece, stop=piece.start + num_good)))
            began, _ = self._times.get(number, (started, 0.0))
            self._times[number] = (min(began, started), time.perf_counter())
        return num_good

    def _settle(self, number: int, piece: Piece, task: asyncio.Task[int]) -> None:
        """Record a read that ended. Blocks that the tier did not deliver are read from another tier, or end the
        prefix.
        """
        err = task.exception()
        if err is not None and not isinstance(err, AntefixError):
            raise err
        this, rest = frozenset({number}), [piece]
        if err is None:
            self._tiers[number].answered()
            left = [piece.after(task.result(), without=self._failed | this)]
        else:
            self._errors.append(err)
            if isinstance(err, _Late):
                self._tiers[number].late(err.begun_s)
            else:
                self._tiers[number].failed(err)
            if isinstance(err, ReadHangs):
                # No other tier may fill these buffers: the hanging read could overwrite them later.
                self._hanging.append(err)
                self._end_at(0)
                return
            rest += self._shares.take_back(number)
            if isinstance(err, _Late):
                left = [each.after(0, without=self._failed, late=this) for each in rest]
            else:
                self._failed |= this
                left = [each.after(0, without=self._failed) for each in rest]
        for each in left:
            if each.num_blocks and each.start < self._limit:
                if each.holders:
                    self._shares.give([each])
                else:
                    self._end_at(each.start)

    def _has_other(self, number: int, piece: Piece) -> bool:
        return bool(piece.holders - {number} - self._failed)

    def _end_at(self, block: int) -> None:
        self._limit = block
        self._shares.drop_from(block)
        for task, (_, piece) in self._running.items():
            if piece.start >= block:
                task.cancel()

    def _by_tier(self) -> list[TierRead]:
        """How many blocks of the prefix each tier delivered. Updates each tier's measured speed."""
        block_bytes = self._wanted.block_bytes
        reads = []
        for number, (began, ended) in sorted(self._times.items()):
            tier, pieces = self._tiers[number], [piece for giver, piece in self._given if giver == number]
            if number not in self._failed:
                tier.speed.observe(sum(piece.num_blocks for piece in pieces) * block_bytes, ended - began)
            good = sum(max(0, min(piece.stop, self._limit) - piece.start) for piece in pieces)
            if good:
                reads.append(
                    TierRead(
                        tier=tier.label,
                        kind=tier.kind,
                        num_blocks=good,
                        nbytes=good * block_bytes,
                        seconds=ended - began,
                    )
                )
        return reads


def _error_of(task: asyncio.Task[int]) -> BaseException | None:
    return None if task.cancelled() else task.exception()
