"""The files of a ledger's directory, for readers. Any process may read while one writes.

usage-000000000001.ledger   segments, named by their first entry's sequence number
index/                      LMDB, of sealed segments only; rebuilt from them when lost
acknowledged                the last acknowledged entry (ledger_mark.py)
progress                    how much work and output each running request has had so far (progress_slots.py)
pruned-000000012345.json    a signed summary in place of segments that were pruned (pruned.py)
source                      this ledger's identity, 32 hex digits
lock                        held by the one writer
"""

from __future__ import annotations

import functools
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from antefix.directory_lock import DirectoryLock
from antefix.errors import ConfigError
from antefix.own_files import open_to_read, read_small
from antefix.private_file import open_private
from antefix_billing.adjustment import Adjusted, Adjustment
from antefix_billing.ledger_format import (
    SEGMENT_HEADER_BYTES,
    SOURCE_BYTES,
    Entry,
    EntryKind,
    LedgerCorrupt,
    chain_hash,
    entries_of,
    has_later_batch,
    unpack_entry,
    unpack_segment_header,
)
from antefix_billing.ledger_mark import Mark
from antefix_billing.pruned import pruned_to
from antefix_billing.usage_record import UsageRecord

_GLOB = "usage-*.ledger"
# Numbers of entries are 64-bit, so they have at most 20 digits.
_NAME = re.compile(r"usage-([0-9]{12}|[1-9][0-9]{12,19})\.ledger")
# Segments are 16 MiB. A file that is far longer was not written by this program, and is not read to its end.
_SEGMENT_BYTES_MAX = 256 << 20
_SOURCE_FILE_BYTES_MAX = 4096
SOURCE_PREFIX = "antefix/"
RESTORE = "restore the ledger from a copy, or give the router a new directory and keep this one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """One settled request with its place in the ledger. With `previous_hash`, anyone can recompute `hash` from the
    payload.
    """

    sequence: int
    hash: bytes
    previous_hash: bytes
    record: UsageRecord


@functools.lru_cache(64)
def segment_path(directory: Path, first_sequence: int) -> Path:
    return directory / f"usage-{first_sequence:012d}.ledger"


def segments_of(directory: Path) -> list[Path]:
    """The ledger's segments, oldest first. A file whose name this program does not give is no segment."""
    return sorted(path for path in directory.glob(_GLOB) if _NAME.fullmatch(path.name))


def first_sequence_of(path: Path) -> int:
    return int(path.stem.removeprefix("usage-"))


def check_header(path: Path, source: bytes) -> None:
    """Raises:  LedgerCorrupt: the header is damaged, another ledger's, or another segment's."""
    try:
        header = unpack_segment_header(read_small(path, SEGMENT_HEADER_BYTES))
    except LedgerCorrupt as err:
        raise LedgerCorrupt(f"{path.name}: {err}; {RESTORE}") from err
    if header.source != source:
        raise LedgerCorrupt(f"{path.name} belongs to another ledger; {RESTORE}")
    if header.first_sequence != first_sequence_of(path):
        raise LedgerCorrupt(f"{path.name} holds the entries from {header.first_sequence} on; {RESTORE}")


def source_of(directory: Path) -> bytes:
    """The ledger's identity.  Raises:  ConfigError: the directory has no ledger."""
    try:
        return bytes.fromhex(read_small(directory / "source", _SOURCE_FILE_BYTES_MAX).decode().strip())
    except (OSError, ValueError) as err:
        raise ConfigError(f"{directory} is not a ledger: {err}") from err


def source_of_name(name: str) -> bytes:
    """The ledger's identity, from the `source` text in records and CloudEvents. Raises: ValueError: the text does not
    name a ledger.
    """
    return bytes.fromhex(name.removeprefix(SOURCE_PREFIX))


def source_name_of(source: bytes) -> str:
    """The `source` text that stands for this identity in records and CloudEvents."""
    return f"{SOURCE_PREFIX}{source.hex()}"


def ledgers_of(paths: Sequence[Path]) -> list[Path]:
    """Ledger directories. Each path is a ledger's directory, or a directory that holds several ledgers, such as that of
    `antefix up` with several routers.

    Raises:  ConfigError: a path holds no ledger, or the same ledger comes twice.
    """
    found: list[Path] = []
    for path in paths:
        inside = [path] if (path / "source").is_file() else sorted(each.parent for each in path.glob("*/source"))
        if not inside:
            raise ConfigError(f"{path} is not a ledger and holds none")
        found += inside
    if len({source_of(path) for path in found}) != len(found):
        raise ConfigError("two ledgers have the same source id: one ledger is named twice, or was copied")
    return found


def read_entries(directory: Path, *, after: int = 0) -> Iterator[tuple[bytes, Entry]]:
    """(previous hash, entry) of each entry with sequence > `after`. Checks the chain while reading.

    Segments that end before `after` are not read, so the first hash read is trusted; `verify` reads all segments.
    Pruned entries are skipped: reading begins after them.
    Raises:  LedgerCorrupt: the chain is broken, entries are missing, or a sealed segment is damaged.
    """
    mark = Mark.of(directory)
    source = source_of(directory) if (directory / "source").exists() else None
    paths, begin, begin_hash = _kept_of(directory)
    if mark is not None and not paths:
        raise LedgerCorrupt(f"all segments of {directory} are missing, entry {mark.sequence} was the last; {RESTORE}")
    firsts = [first_sequence_of(path) for path in paths]
    start = max((i for i, first in enumerate(firsts) if first <= after + 1), default=0)
    previous: bytes | None = None if start else begin_hash
    expected = firsts[start] if start < len(firsts) else begin
    if not start and expected != begin:
        raise LedgerCorrupt(f"the ledger begins with entry {expected}: earlier segments are missing")
    for index in range(start, len(paths)):
        data = read_segment(paths[index])
        is_last = index == len(paths) - 1
        if is_last and len(data) <= SEGMENT_HEADER_BYTES:
            break
        header = unpack_segment_header(data)
        if source is not None and header.source != source:
            raise LedgerCorrupt(
                f"{paths[index].name} belongs to ledger {header.source.hex()}, but is in the directory of ledger"
                f" {source.hex()}: entries from {header.first_sequence} on are not this ledger's"
            )
        if header.first_sequence != expected or (previous is not None and header.previous_hash != previous):
            raise LedgerCorrupt(f"{paths[index].name} does not continue the segment before it")
        previous = header.previous_hash
        stop = SEGMENT_HEADER_BYTES
        for entry in entries_of(data):
            if entry.sequence != expected or entry.hash != chain_hash(previous, expected, entry.kind, entry.payload):
                raise LedgerCorrupt(f"entry {expected} in {paths[index].name} does not continue the chain")
            if entry.sequence > after:
                yield previous, entry
            previous, expected, stop = entry.hash, expected + 1, entry.end
        # This holds for the first entry too: an intact batch after it proves that it was durable once.
        if stop != len(data) and (not is_last or has_later_batch(data, stop)):
            raise LedgerCorrupt(f"{paths[index].name} is damaged at byte {stop}")
        if stop == SEGMENT_HEADER_BYTES and not is_last:
            raise LedgerCorrupt(f"{paths[index].name} holds no entry")
    check_mark(mark, expected - 1)


def _kept_of(directory: Path) -> tuple[list[Path], int, bytes]:
    """(segments that were not pruned, the number of their first entry, the hash before that entry)."""
    for _ in range(2):
        last, hash = pruned_to(directory)
        paths = [path for path in segments_of(directory) if first_sequence_of(path) > last]
        if not paths or first_sequence_of(paths[0]) == last + 1:
            break
        # The segment was pruned between the two directory listings.
    return paths, last + 1, hash


def check_mark(mark: Mark | None, last: int) -> None:
    """Raises:  LedgerCorrupt: acknowledged entries are missing or damaged."""
    if mark is not None and mark.sequence > last:
        raise LedgerCorrupt(
            f"entries {last + 1} to {mark.sequence} were acknowledged and are damaged or missing in"
            f" {segment_path(Path(), mark.segment).name}; {RESTORE}"
        )


def read_settled(directory: Path, *, after: int = 0) -> Iterator[Settled]:
    """Settled requests in ledger order.  Raises:  the same errors as `read_entries`."""
    for previous, entry in read_entries(directory, after=after):
        if entry.kind is EntryKind.SETTLE:
            yield settled_of(previous, entry)


def settled_of(previous: bytes, entry: Entry) -> Settled:
    return Settled(
        sequence=entry.sequence,
        hash=entry.hash,
        previous_hash=previous,
        record=UsageRecord.from_payload(entry.payload),
    )


def adjusted_of(previous: bytes, entry: Entry) -> Adjusted:
    return Adjusted(
        sequence=entry.sequence,
        hash=entry.hash,
        previous_hash=previous,
        adjustment=Adjustment.from_payload(entry.payload),
    )


def read_billed(directory: Path, *, after: int = 0) -> Iterator[Settled | Adjusted]:
    """Settled requests and adjustments in ledger order.  Raises:  the same errors as `read_entries`."""
    for previous, entry in read_entries(directory, after=after):
        if entry.kind is EntryKind.SETTLE:
            yield settled_of(previous, entry)
        elif entry.kind is EntryKind.ADJUST:
            yield adjusted_of(previous, entry)


def sequence_before(directory: Path, time_s: float) -> int:
    """A sequence number such that no entry up to it was written after `time_s` (Unix seconds), judged by the segments'
    file times.
    """
    paths = segments_of(directory)
    return next((first_sequence_of(path) - 1 for path in paths if path.stat().st_mtime >= time_s), 0)


def read_entry_at(path: Path, offset: int) -> Entry:
    """Read one entry.  Raises:  LedgerCorrupt: there is no intact entry at this offset."""
    try:
        with os.fdopen(open_to_read(path), "rb") as file:
            file.seek(offset)
            entry = unpack_entry(file.read(72 << 10), 0)
    except FileNotFoundError as err:
        raise LedgerCorrupt(f"{path.name} is missing; {RESTORE}") from err
    if entry is None:
        raise LedgerCorrupt(f"{path.name}: no entry at byte {offset}")
    return entry


def read_segment(path: Path) -> bytes:
    """Read a segment. Raises: LedgerCorrupt: the segment is missing, is not a regular file, or is far longer than a
    segment can be.
    """
    try:
        data = read_small(path, _SEGMENT_BYTES_MAX)
    except FileNotFoundError as err:
        raise LedgerCorrupt(f"{path.name} is missing; {RESTORE}") from err
    if len(data) > _SEGMENT_BYTES_MAX:
        raise LedgerCorrupt(f"{path.name} has more than {_SEGMENT_BYTES_MAX} bytes, which no segment has; {RESTORE}")
    return data


def hash_before(path: Path, entry: Entry) -> bytes:
    """The hash of the entry before this one. Entries have no back pointers, so this reads one segment. Only receipts
    and retries need this hash, and both are rare.
    """
    data = read_segment(path)
    previous = unpack_segment_header(data).previous_hash
    for other in entries_of(data):
        if other.sequence == entry.sequence:
            return previous
        previous = other.hash
    raise LedgerCorrupt(f"entry {entry.sequence} is not in {path.name}")


def prepare_directory(directory: Path) -> None:
    """Create the directory and the ledger's identity durably, if they do not exist.

    Raises:  ConfigError: the directory has segments but no identity, so their origin is unknown.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / "source"
    if path.exists():
        return
    if segments_of(directory):
        raise ConfigError(f"{directory} has segments of a ledger, but no source file: restore the file from a copy")
    part = directory / "source.part"
    with open_private(part, "w") as file:
        file.write(secrets.token_hex(SOURCE_BYTES) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync_directory(directory)


def take_lock(directory: Path) -> DirectoryLock:
    """Take the writer's lock. The lock on the ledger is released when it is closed or when the process dies.

    Raises:  ConfigError: another process holds the lock.
    """
    try:
        return DirectoryLock(directory, "lock")
    except BlockingIOError as err:
        raise ConfigError(
            f"{directory}: another process writes this ledger; each router needs a directory of its own"
        ) from err
    except OSError as err:
        raise ConfigError(f"{directory} cannot be used as a ledger: {err}") from err


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
