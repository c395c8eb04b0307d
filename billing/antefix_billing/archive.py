"""Old segments of a ledger: copies them to an archive (a directory or an object store), prunes them, and restores them
for audits.

    antefix-ledgers/SOURCE/usage-000000000001.ledger    the segments, byte for byte
    antefix-ledgers/SOURCE/pruned-000000012345.json     the summaries (pruned.py)

A segment is pruned only after the whole chain was read and verified, all requests in it are settled, and reading the
segment back from the archive gave the same bytes. Readers of the ledger, and the router, can keep running during this.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from antefix.directory_lock import DirectoryLock
from antefix.errors import ConfigError
from antefix.objects.bucket import Bucket, ObjectGone
from antefix.private_file import open_private, write_private
from antefix_billing.ledger_files import (
    first_sequence_of,
    read_entries,
    read_segment,
    segments_of,
    source_of,
    sync_directory,
)
from antefix_billing.ledger_format import (
    Entry,
    EntryKind,
    chain_hash,
    entries_of,
    unpack_segment_header,
)
from antefix_billing.places import with_bucket
from antefix_billing.pruned import Pruned, PrunedFile, Totals, pruned_of, pruned_to, summary_name
from antefix_billing.receipt import Signer
from antefix_billing.usage_record import OpenEntry, UsageRecord

_FOLDER: Final = "antefix-ledgers"
# A separate lock for pruning. A router that writes the ledger holds the ledger's own lock.
_PRUNING: Final = "pruning"


def archive(ledger: Path, place: str) -> list[str]:
    """Copy the sealed segments that the archive does not have. Returns their names.

    Raises:  LedgerCorrupt: the chain is broken; nothing is copied.  ConfigError: the archive has a different file of
    the same name.
    """
    for _ in read_entries(ledger):
        pass
    paths = _kept(ledger)[:-1]
    folder = _folder(source_of(ledger))

    async def copy(bucket: Bucket) -> list[str]:
        sizes = {each.name: each.nbytes for each in await bucket.list_objects(folder)}
        copied = []
        for path in paths:
            data = await asyncio.to_thread(read_segment, path)
            name = folder + path.name
            if sizes.get(name) != len(data):
                await bucket.put(name, [data])
                copied.append(path.name)
            if _digest(await bucket.read(name, 0, len(data) + 1)) != _digest(data):
                raise ConfigError(
                    f"{place}: the archived file {name} is not what was written there; nothing was removed from the "
                    "ledger"
                )
        return copied

    return with_bucket(place, copy)


@dataclass(slots=True)
class _Segment:
    """A sealed segment of the ledger as it was read. latest_us: the latest time of any of its entries."""

    path: Path
    last: int = 0
    hash: bytes = b""
    latest_us: int = 0
    opened: set[str] = field(default_factory=set)


def prune(
    ledger: Path,
    *,
    before_us: int,
    place: str,
    signer: Signer,
    now_us: int,
    sent_to: int | None = None,
    dry_run: bool = False,
) -> Pruned | None:
    """Replace the segments whose entries are all older than `before_us` by a signed summary.

    place: the archive, which first receives the segments that it lacks; empty: the segments are not kept.  sent_to:
    entries after this number are kept, because receivers do not have them yet.  Returns None if there is nothing to
    prune.
    Raises:  LedgerCorrupt: the chain is broken.  ConfigError: another process prunes this ledger, or the archive is
    faulty.
    """
    (ledger / _PRUNING).mkdir(mode=0o700, exist_ok=True)
    try:
        lock = DirectoryLock(ledger / _PRUNING, "lock")
    except BlockingIOError as err:
        raise ConfigError(f"{ledger}: another process is removing entries from this ledger") from err
    try:
        _remove_pruned(ledger)
        segments = _read_segments(ledger)
        chosen = [each for each in _old_enough(segments, before_us) if sent_to is None or each.last <= sent_to]
        if not chosen:
            return None
        summary = _summary(ledger, chosen, signer, place=place, now_us=now_us)
        if not dry_run:
            if place:
                archive(ledger, place)
                _put_summary(place, summary)
            # From here on the segments count as pruned. If a crash leaves some of them behind, the next call removes
            # them.
            write_private(ledger / summary_name(summary.last), _text(summary))
            sync_directory(ledger)
            _remove_pruned(ledger)
        return summary
    finally:
        lock.close()


def restore(place: str, source: bytes, to: Path, *, ledger: Path | None = None) -> int:
    """Build a read-only ledger from the archive's segments and from those that `ledger` still has. Returns how many
    segments the new ledger has.

    Raises:  ConfigError: the target directory is not empty, or the archive has nothing of this ledger.
    """
    if to.exists() and any(to.iterdir()):
        raise ConfigError(f"{to} is not empty")
    folder = _folder(source)

    async def fetch(bucket: Bucket) -> int:
        found = [each for each in await bucket.list_objects(folder) if each.name.endswith(".ledger")]
        if not found:
            raise ConfigError(f"{place} has no archived entries of ledger {source.hex()}")
        await asyncio.to_thread(to.mkdir, 0o700, True, True)
        for each in found:
            data = bytes(await bucket.read(each.name, 0, each.nbytes))
            await asyncio.to_thread((to / each.name.removeprefix(folder)).write_bytes, data)
        return len(found)

    num_segments = with_bucket(place, fetch)
    for path in _kept(ledger) if ledger is not None else ():
        if not (to / path.name).exists():
            (to / path.name).write_bytes(read_segment(path))
            num_segments += 1
    with open_private(to / "source", "w") as file:
        file.write(source.hex() + "\n")
    return num_segments


def check_archive(ledger: Path, place: str) -> list[str]:
    """Check the archive's files against the summaries: bytes, chain and sums. Returns the mismatches; the list is empty
    if there are none.
    """
    folder = _folder(source_of(ledger))

    async def check(bucket: Bucket) -> list[str]:
        faults = []
        for summary in pruned_of(ledger):
            files: list[bytes] = []
            for each in summary.files:
                try:
                    files.append(bytes(await bucket.read(folder + each.name, 0, each.nbytes + 1)))
                except ObjectGone:
                    faults.append(f"{each.name} is not in {place}")
            if len(files) == len(summary.files):
                faults += _faults_of(summary, files)
        return faults

    return with_bucket(place, check)


def _faults_of(summary: Pruned, files: Sequence[bytes]) -> list[str]:
    what = f"entries {summary.first} to {summary.last}"
    for each, data in zip(summary.files, files, strict=True):
        if _digest(data) != each.digest:
            return [f"{what}: {each.name} is not the file that was pruned"]
    totals, hash, sequence = Totals(), summary.previous_hash, summary.first - 1
    for data in files:
        if unpack_segment_header(data).previous_hash != hash:
            return [f"{what}: the chain breaks after entry {sequence}"]
        for entry in entries_of(data):
            sequence, hash = sequence + 1, chain_hash(hash, sequence + 1, entry.kind, entry.payload)
            totals.add(entry)
    if (sequence, hash) != (summary.last, summary.hash):
        return [f"{what}: the files end with entry {sequence}, and another hash than the summary has"]
    return [] if totals.sums() == summary.totals else [f"{what}: the summary has other sums than its entries add up to"]


def _read_segments(ledger: Path) -> list[_Segment]:
    """Read all segments and check the chain. Each segment comes with the requests that are opened in it and settled
    nowhere.
    """
    paths = _kept(ledger)
    firsts = [first_sequence_of(path) for path in paths]
    segments = [_Segment(path) for path in paths]
    opened_in: dict[str, _Segment] = {}
    for _, entry in read_entries(ledger):
        segment = segments[bisect_right(firsts, entry.sequence) - 1]
        segment.last, segment.hash = entry.sequence, entry.hash
        key, time_us = _key_and_time(entry)
        segment.latest_us = max(segment.latest_us, time_us)
        if entry.kind is EntryKind.OPEN:
            opened_in.setdefault(key, segment)
        elif entry.kind is EntryKind.SETTLE:
            opened_in.pop(key, None)
    for key, segment in opened_in.items():
        segment.opened.add(key)
    return segments


def _key_and_time(entry: Entry) -> tuple[str, int]:
    if entry.kind is EntryKind.OPEN:
        opened = OpenEntry.from_payload(entry.payload)
        return opened.key, opened.started_us
    if entry.kind is EntryKind.SETTLE:
        record = UsageRecord.from_payload(entry.payload)
        return record.key, record.finished_us
    # The entry is a change or an adjustment.
    return "", int(json.loads(entry.payload)["created_us"])


def _old_enough(segments: Sequence[_Segment], before_us: int) -> list[_Segment]:
    """The oldest segments that may be pruned. The last segment may never be pruned, because the router still writes
    it.
    """
    chosen = []
    for segment in segments[:-1]:
        if segment.latest_us >= before_us or segment.opened:
            break
        chosen.append(segment)
    return chosen


def _summary(ledger: Path, chosen: Sequence[_Segment], signer: Signer, *, place: str, now_us: int) -> Pruned:
    totals, files = Totals(), []
    last, hash = pruned_to(ledger)
    for segment in chosen:
        data = read_segment(segment.path)
        files.append(PrunedFile(name=segment.path.name, nbytes=len(data), digest=_digest(data)))
        for entry in entries_of(data):
            totals.add(entry)
    unsigned = Pruned(
        source=source_of(ledger),
        first=last + 1,
        last=chosen[-1].last,
        previous_hash=hash,
        hash=chosen[-1].hash,
        time_us=now_us,
        archive=place,
        files=tuple(files),
        totals=totals.sums(),
    )
    return replace(unsigned, key_id=signer.key_id, signature=signer.sign(unsigned.signed()))


def _put_summary(place: str, summary: Pruned) -> None:
    name = _folder(summary.source) + summary_name(summary.last)
    with_bucket(place, lambda bucket: bucket.put(name, [_text(summary).encode()]))


def _remove_pruned(ledger: Path) -> None:
    last, _ = pruned_to(ledger)
    for path in segments_of(ledger):
        if first_sequence_of(path) <= last:
            path.unlink()
    sync_directory(ledger)


def _kept(ledger: Path) -> list[Path]:
    """The segments that were not pruned."""
    last, _ = pruned_to(ledger)
    return [path for path in segments_of(ledger) if first_sequence_of(path) > last]


def _folder(source: bytes) -> str:
    return f"{_FOLDER}/{source.hex()}/"


def _digest(data: object) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()  # type: ignore[arg-type]


def _text(summary: Pruned) -> str:
    return json.dumps(summary.to_dict(), indent=1) + "\n"
