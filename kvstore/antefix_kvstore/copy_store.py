"""Copies a store's contents to other stores: resumable, verified, at a bounded rate. The copy is used by `antefix store
copy` and `antefix drain`.

Records that a target store has already are not sent. So a copy that broke off continues when it is run again, and a
store that is being written to is copied repeatedly until nothing new is found. Each record is checked when it is read,
in transit, and by the target's readers.
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
    """A source of records: a directory (`StoreContents`), a service (`ServedContents`) or an object store
    (`ObjectContents`). Its calls block.
    """

    def layouts(self) -> list[LayoutOf]:
        """The payload layouts of all fingerprints."""

    def stretches(self) -> list[Stretch]:
        """All stretches of blocks in the store, the most valuable first."""

    def records(self, stretch: Stretch, wanted: Sequence[RecordName]) -> Iterator[list[Record]]:
        """The wanted records of a stretch of chain, verified. Records that cannot be read are left out."""


class CopyTarget(Protocol):
    """Where records go. The targets of a copy are stores, and one of them can be an object store."""

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held: ...

    async def put(self, records: Sequence[Record]) -> PutResult: ...

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int: ...

    async def register_layout(self, layout: LayoutOf) -> None:
        """This method is called before the first record of a fingerprint is put."""

    async def stats(self) -> StoreTotals: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class CopyReport:
    """Counts are numbers of records; sizes are payload bytes.

    num_there: records that a target had already.  num_left: records not copied for lack of room.
    num_missing: records that the targets should hold after the copy and do not.  refusals: why targets refused records.
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
    """bytes_per_s: payload bytes per second; 0: no limit.  bytes_max: payload bytes in all, most valuable first; None:
    all.
    """

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
    """Copy the records that no target has, each stretch to the target with the most room.

    grant_for: makes the grant that lets us store and pin for an owner; empty where the targets ask for none.
    Raises:  AntefixError: a target does not answer. What was copied stays, and the next run continues after it.
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
    """The records of a stretch that none of the target stores has."""
    asked = (target.held(stretch.hashes, fingerprint=stretch.fingerprint, tenant=owner) for target in targets)
    there: set[RecordName] = set()
    for held in await asyncio.gather(*asked):
        there.update((RecordKind.BLOCK, stretch.hashes[block]) for span in held.spans for block in range(*span))
        there.update((RecordKind.CHECKPOINT, stretch.hashes[number - 1]) for number in held.checkpoints)
    return [name for name in stretch.names if name not in there]


async def _copy_stretch(
    contents: CopySource, target: CopyTarget, stretch: Stretch, wanted: Sequence[RecordName], run: _Run
) -> int:
    """Returns the payload bytes that were stored at the targets."""
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
    """Records that are pinned at the source are pinned at the target, for the rest of their pins' time."""
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
    """One run of a copy, with its counts and its rate limit."""

    bytes_per_s: int
    report: CopyReport = field(default_factory=CopyReport)
    started_s: float = field(default_factory=time.monotonic)

    async def wait(self) -> None:
        """Wait until the bytes copied so far do not exceed the rate limit."""
        if self.bytes_per_s:
            due_s = self.started_s + self.report.bytes_copied / self.bytes_per_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
