"""Copies what a store holds to other stores: resumable, verified, at a bounded rate. Behind `antefix store copy` and
`antefix drain`.

What a target has already is not sent, so a copy that broke off continues when it is run again, and one under load is
run again until it finds nothing new. A record is checked when it is read, on its way, and by the reader there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from antefix.record import Held, PutResult, Record, RecordKind, RecordName
from antefix.security.grants import hold
from antefix.store.store_stats import StoreTotals
from antefix.store_files.segment_reader import wall_ms
from antefix_kvstore.store_contents import LayoutOf, Stretch

_BATCH_BYTES: Final = 16 << 20
Progress = Callable[[int, int], None]


class CopySource(Protocol):
    """What records come from: a directory (`StoreContents`), a service (`ServedContents`), an object store
    (`ObjectContents`). Calls block."""

    def layouts(self) -> list[LayoutOf]:
        """Of all fingerprints."""

    def stretches(self) -> list[Stretch]:
        """All of it, what is worth most first."""

    def records(self, stretch: Stretch, wanted: Sequence[RecordName]) -> Iterator[list[Record]]:
        """These of a stretch, verified; what cannot be read is left out."""


class CopyTarget(Protocol):
    """Where records go. Stores are targets; an object store can be one."""

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held: ...

    async def put(self, records: Sequence[Record]) -> PutResult: ...

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int: ...

    async def register_layout(self, layout: LayoutOf) -> None:
        """Before the first record of a fingerprint."""

    async def stats(self) -> StoreTotals: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class CopyReport:
    """In records and payload bytes. num_there: that a target had already.  num_left: not copied, for lack of room.

    num_missing: that should be there afterwards and are not; refusals: why targets did not take some of them.
    """

    num_copied: int = 0
    bytes_copied: int = 0
    num_there: int = 0
    num_left: int = 0
    num_missing: int = 0
    refusals: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.num_missing


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLimits:
    """bytes_per_s: of payloads; 0: as fast as it goes.  bytes_max: in all, what is worth most first; None: all."""

    bytes_per_s: int = 0
    bytes_max: int | None = None


def _no_grant(_: bytes) -> bytes:
    return b""


async def copy_store(
    contents: CopySource,
    targets: Sequence[CopyTarget],
    limits: CopyLimits,
    *,
    grant_for: Callable[[bytes], bytes] = _no_grant,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy what no target has, each stretch to the target with the most room.

    grant_for: signs what targets ask for, for an owner; empty: they ask for nothing.
    Raises:  AntefixError: a target does not answer; what was copied stays, and the next run continues behind it.
    """
    run = _Run(limits.bytes_per_s)
    report = run.report
    for layout in contents.layouts():
        await asyncio.gather(*(target.register_layout(layout) for target in targets))
    stretches = contents.stretches()
    room = [await _room_of(target) for target in targets]
    for number, stretch in enumerate(stretches):
        owner = stretch.owner[1:]
        hold(grant_for(owner))
        missing = await _missing(targets, stretch, owner)
        report.num_there += len(stretch.names) - len(missing)
        budget = None if limits.bytes_max is None else limits.bytes_max - report.bytes_copied
        if missing and budget is not None and stretch.nbytes > budget:
            report.num_left += len(missing)
        elif missing:
            best = max(range(len(targets)), key=room.__getitem__)
            room[best] -= await _copy_stretch(contents, targets[best], stretch, missing, run)
            report.num_missing += len(await _missing(targets, stretch, owner))
            await _keep_pin(targets[best], stretch, owner)
        if progress is not None:
            progress(number + 1, len(stretches))
    return report


async def _missing(targets: Sequence[CopyTarget], stretch: Stretch, owner: bytes) -> list[RecordName]:
    """The records of a stretch that none of the targets has."""
    asked = (target.held(stretch.hashes, fingerprint=stretch.fingerprint, tenant=owner) for target in targets)
    there: set[RecordName] = set()
    for held in await asyncio.gather(*asked):
        there.update((RecordKind.BLOCK, stretch.hashes[block]) for span in held.spans for block in range(*span))
        there.update((RecordKind.CHECKPOINT, stretch.hashes[number - 1]) for number in held.checkpoints)
    return [name for name in stretch.names if name not in there]


async def _copy_stretch(
    contents: CopySource, target: CopyTarget, stretch: Stretch, wanted: Sequence[RecordName], run: _Run
) -> int:
    """Returns the payload bytes that were stored."""
    copied = 0
    for records in contents.records(stretch, wanted):
        for batch in _batches(records):
            result = await target.put(batch)
            for refusal in result.refused.values():
                run.report.refusals[refusal.text] = run.report.refusals.get(refusal.text, 0) + 1
            taken = [record for record in batch if record.hash not in result.refused]
            nbytes = sum(len(record.payload) for record in taken)
            run.report.num_copied += len(taken)
            run.report.bytes_copied += nbytes
            copied += nbytes
            await run.wait()
    return copied


async def _keep_pin(target: CopyTarget, stretch: Stretch, owner: bytes) -> None:
    """What was pinned here is pinned there for the rest of its time."""
    left_s = (stretch.pinned_ms - wall_ms()) / 1000
    if left_s > 0:
        kind = RecordKind.BLOCK if stretch.has_blocks else RecordKind.CHECKPOINT
        await target.pin([(kind, stretch.hashes[-1])], duration_s=left_s, owner=owner)


async def _room_of(target: CopyTarget) -> int:
    totals = await target.stats()
    return (totals.limit_bytes or totals.budget_bytes) - totals.used_bytes


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    nbytes = 0
    for record in records:
        nbytes += len(record.payload)
        if batch and nbytes > _BATCH_BYTES:
            yield batch
            batch, nbytes = [], len(record.payload)
        batch.append(record)
    if batch:
        yield batch


@dataclass(slots=True)
class _Run:
    """One copy, and its pace."""

    bytes_per_s: int
    report: CopyReport = field(default_factory=CopyReport)
    started_s: float = field(default_factory=time.monotonic)

    async def wait(self) -> None:
        """Until what was copied is no more than the rate allows."""
        if self.bytes_per_s:
            due_s = self.started_s + self.report.bytes_copied / self.bytes_per_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
