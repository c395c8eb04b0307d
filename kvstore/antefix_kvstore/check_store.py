"""Checks a whole store that nobody is writing to, and repairs it on request.

The segments are the truth and the index is derived from them. A repair rebuilds the index from the records whose
checksums hold; damaged records, and records that depend on them, are left out. Records that were evicted but still lie
in a segment come back after a repair. Such evicted records are valid, and the store evicts them again when it needs the
room.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import lmdb
import lmdb.verify

from antefix.errors import BlockCorrupt, Unavailable
from antefix.own_files import MISPLACED, open_to_read, put_aside, read_small
from antefix.record import RecordKind, RecordName
from antefix.store_files.index import TABLE_OF_KIND, Index
from antefix.store_files.record_format import (
    INDEX_DIR,
    RECORD_HEADER_BYTES,
    SEGMENT_DIR,
    SEGMENT_HEADER_BYTES,
    STORE_FILE,
    STORE_HEADER,
    IndexEntry,
    RecordFlag,
    payload_checksum,
    segment_name,
    segment_number,
    unpack_entry,
    unpack_identity,
    unpack_segment_header,
)
from antefix.store_files.record_header import expected_checksum
from antefix_kvstore.disk import Disk
from antefix_kvstore.identity import lock_directory, no_store, put_aside_misplaced
from antefix_kvstore.index_check import index_fault
from antefix_kvstore.index_writer import read_segments
from antefix_kvstore.recovery import rebuild_store
from antefix_kvstore.space import parent_of

NUM_EXAMPLES_MAX: Final = 20
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class FsckReport:
    """problems: the number of problems of each kind. examples: a few of them in words."""

    num_records: int = 0
    num_bytes: int = 0
    num_segments: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    repaired: bool = False
    num_records_after: int = 0

    @property
    def sound(self) -> bool:
        return not self.problems

    def note(self, problem: str, detail: str) -> None:
        self.problems[problem] = self.problems.get(problem, 0) + 1
        if len(self.examples) < NUM_EXAMPLES_MAX:
            self.examples.append(f"{problem}: {detail}")


def fsck(directory: Path, *, repair: bool = False, progress: Progress | None = None) -> FsckReport:
    """Check every record, and how records depend on each other; with `repair`, rebuild the index.

    progress: called with the number of records done and the number in all.
    Raises:  ConfigError: not a store, or one that a service has open.
    """
    if not (directory / SEGMENT_DIR).is_dir():
        raise no_store(directory)
    lock = lock_directory(directory)
    try:
        report = _check(directory, progress)
        if repair and not report.sound:
            put_aside_misplaced(directory)
            for path in (directory / SEGMENT_DIR).iterdir():
                if segment_number(path.name) is not None:
                    put_aside(path)
            rebuild_store(directory, Disk())
            after = _check(directory, None)
            report.repaired = after.sound
            report.num_records_after = after.num_records
        return report
    finally:
        lock.close()


def render(report: FsckReport) -> str:
    """The report as text for a terminal."""
    lines = [f"{report.num_records} records, {report.num_bytes} bytes in {report.num_segments} segments"]
    lines += [f"  {count} x {problem}" for problem, count in Counter(report.problems).most_common()]
    lines += [f"    {example}" for example in report.examples]
    if report.sound:
        lines.append("sound")
    elif report.repaired:
        lines.append(f"repaired: {report.num_records_after} records are left, all of them sound")
    else:
        lines.append("damaged; `fsck --repair` rebuilds the index from the sound records")
    return "\n".join(lines)


def _check(directory: Path, progress: Progress | None) -> FsckReport:
    report = FsckReport()
    # 1. The store's files, each by itself.
    seed = _check_identity(directory, report)
    sizes = _check_segment_files(directory, report)
    index_fault = _index_fault(directory)
    if index_fault or seed is None:
        report.note("index", index_fault or "cannot be judged without the STORE file")
        return report
    # 2. Every record that the index names.
    index = Index(directory / INDEX_DIR)
    try:
        with index.txn() as txn:
            entries = _check_entries(index, txn, report)
            _check_records(directory, index, txn, entries, seed, report, progress)
            # 3. How the records depend on each other.
            _check_forest(entries, report)
            _check_derived(index, txn, sizes, report)
    finally:
        index.close()
    return report


def _check_identity(directory: Path, report: FsckReport) -> int | None:
    try:
        return unpack_identity(read_small(directory / STORE_FILE, STORE_HEADER.size)).seed
    except (FileNotFoundError, BlockCorrupt) as err:
        report.note("identity", str(err))
        return None


def _check_segment_files(directory: Path, report: FsckReport) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for path in sorted((directory / SEGMENT_DIR).iterdir()):
        number = segment_number(path.name)
        if MISPLACED in path.name:
            continue  # put aside by the store or by a repair, for an operator to look at
        if number is None:
            report.note("stray file", path.name)
            continue
        try:
            with os.fdopen(open_to_read(path), "rb") as file:
                sizes[number] = os.fstat(file.fileno()).st_size
                _, named = unpack_segment_header(file.read(SEGMENT_HEADER_BYTES))
            if named != number:
                report.note("segment header", f"{path.name} says that it is segment {named}")
        except FileNotFoundError as err:
            report.note("misplaced file", f"{path.name}: {err.strerror}")
        except BlockCorrupt as err:
            report.note("segment header", f"{path.name}: {err}")
    report.num_segments = len(sizes)
    return sizes


def _index_fault(directory: Path) -> str | None:
    if not (directory / INDEX_DIR / "data.mdb").is_file():
        return "missing"
    verify: Callable[..., list[str]] = lmdb.verify.verify
    try:
        faults = verify(str(directory / INDEX_DIR), subdir=True)
        Index(directory / INDEX_DIR).close()
    except (lmdb.verify.VerifyError, Unavailable, OSError, ValueError) as err:
        return str(err)
    return faults[0] if faults else None


def _check_entries(index: Index, txn: Any, report: FsckReport) -> dict[RecordName, IndexEntry]:
    entries: dict[RecordName, IndexEntry] = {}
    for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
        with txn.cursor(db=index.db[TABLE_OF_KIND[kind]]) as cursor:
            for key, value in cursor:
                entry = unpack_entry(value, key)
                if entry is None:
                    report.note("index entry", f"{kind.name} {key.hex()[:16]} has a wrong checksum")
                else:
                    entries[kind, key] = entry
    report.num_records = len(entries)
    return entries


def _check_records(
    directory: Path,
    index: Index,
    txn: Any,
    entries: dict[RecordName, IndexEntry],
    seed: int,
    report: FsckReport,
    progress: Progress | None,
) -> None:
    fingerprints = index.fingerprints(txn)
    in_disk_order = sorted(entries.items(), key=lambda item: (item[1].segment, item[1].offset))
    for done, (name, entry) in enumerate(in_disk_order, start=1):
        what = f"{name[0].name} {name[1].hex()[:16]} in segment {entry.segment} at {entry.offset}"
        if entry.quarantined:
            report.note("quarantined", what)
            continue
        raw = _read(directory, entry)
        checksum = expected_checksum(
            raw[:RECORD_HEADER_BYTES],
            seed,
            kind=name[0],
            block_hash=name[1],
            fingerprint=fingerprints.get(entry.fingerprint_id, b""),
            entry=entry,
        )
        if checksum is None:
            report.note("record header", what)
        elif payload_checksum(raw[RECORD_HEADER_BYTES:]) != checksum:
            report.note("payload", what)
        report.num_bytes += len(raw)
        if progress is not None:
            progress(done, len(entries))


def _read(directory: Path, entry: IndexEntry) -> bytes:
    try:
        fd = open_to_read(directory / SEGMENT_DIR / segment_name(entry.segment))
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, RECORD_HEADER_BYTES + entry.stored_bytes, entry.offset)
    finally:
        os.close(fd)


def _check_forest(entries: dict[RecordName, IndexEntry], report: FsckReport) -> None:
    children: Counter[RecordName] = Counter()
    for name, entry in entries.items():
        if entry.flags & (RecordFlag.FIRST | RecordFlag.APART):
            continue
        parent = parent_of(name, entry.parent)
        children[parent] += 1
        if parent not in entries:
            report.note("orphan", f"{name[0].name} {name[1].hex()[:16]} has no parent")
    for name, entry in entries.items():
        if entry.children != children[name]:
            report.note("children", f"{name[1].hex()[:16]} counts {entry.children}, there are {children[name]}")


def _check_derived(index: Index, txn: Any, sizes: dict[int, int], report: FsckReport) -> None:
    for number, state in read_segments(index, txn).items():
        if state.live_records and sizes.get(number, 0) < state.end:
            report.note("segment table", f"segment {number} should have {state.end} bytes")
    if not report.problems.get("index entry") and (fault := index_fault(index.directory)):
        report.note("index", fault)
