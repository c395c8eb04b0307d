"""What a store directory holds, by namespace, owner, kind and age, and a drawing of its prefix forest.

Reads the index only, so it may run while a service uses the store. Blocks without a fork between them are one line.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from antefix.block import fields_of
from antefix.cache_tenant import split_tenant
from antefix.errors import BlockCorrupt, ConfigError
from antefix.own_files import read_small
from antefix.record import RecordKind
from antefix.store_files.index import TABLE_OF_KIND, Index
from antefix.store_files.owners import KnownNames
from antefix.store_files.record_format import (
    INDEX_DIR,
    SEGMENT_DIR,
    STORE_FILE,
    STORE_HEADER,
    IndexEntry,
    StoreIdentity,
    segment_number,
    unpack_entry,
    unpack_identity,
)
from antefix.store_files.segment_reader import wall_ms
from antefix.text_table import text_table
from antefix_kvstore.identity import no_store

Progress = Callable[[int, int], None]
NUM_LINES_MAX: Final = 40
_PROGRESS_EVERY: Final = 10_000
_TOLD: Final = ("family", "kv_format", "namespace", "exactness", "arithmetic", "num_cards", "group", "shard")
# Upper bounds of the age classes in seconds, and the names of the classes.
AGES: Final = ((60, "< 1 min"), (3600, "< 1 h"), (86_400, "< 1 d"), (7 * 86_400, "< 7 d"), (float("inf"), "older"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Records of one namespace (fingerprint), owner and kind.

    tenant, user: names if they are known, else digests. The user is empty if all users of the tenant share one cache.
    about: the model and settings that the fingerprint stands for, if known. version: format version of the records.
    generation: of the secret that named and sealed the records; 0: no secret. ages: number of records by time since
    last use.
    """

    fingerprint: str
    about: dict[str, Any]
    tenant: str
    user: str
    version: int
    generation: int
    kind: RecordKind
    num_records: int
    stored_bytes: int
    payload_bytes: int
    num_compressed: int
    num_quarantined: int
    ages: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of blocks without a fork between them. depth: the number of forks above the run."""

    depth: int
    first_position: int
    last_position: int
    num_blocks: int
    num_checkpoints: int
    stored_bytes: int
    used_s_ago: float
    last_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    directory: str
    identity: StoreIdentity
    num_segments: int
    segment_bytes: int
    index_bytes: int
    holdings: list[Holding]
    forest: list[Run] = field(default_factory=list)
    num_runs_left_out: int = 0


def inspect(
    directory: Path,
    *,
    num_lines_max: int = NUM_LINES_MAX,
    known: KnownNames | None = None,
    progress: Progress = lambda done, total: None,
) -> StoreReport:
    """known: tenants' names, shown instead of their digests. progress: called with the number of entries read and the
    number of all entries.

    Raises:  ConfigError: not a store.  Unavailable: its index cannot be opened.
    """
    try:
        identity = unpack_identity(read_small(directory / STORE_FILE, STORE_HEADER.size))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise no_store(directory, f"it has no file {STORE_FILE}") from err
    except BlockCorrupt as err:
        raise ConfigError(f"{directory} is not an Antefix store: {err}") from err
    files = [path for path in (directory / SEGMENT_DIR).iterdir() if segment_number(path.name) is not None]
    index = Index(directory / INDEX_DIR)
    try:
        with index.txn() as txn:
            fingerprints, owners, generations = index.fingerprints(txn), index.owners(txn), index.generations(txn)
            statements = {digest: index.statement(txn, digest) for digest in fingerprints.values()}
            entries = _entries(index, txn, progress)
    finally:
        index.close()
    runs = _forest(entries)
    return StoreReport(
        directory=str(directory),
        identity=identity,
        num_segments=len(files),
        segment_bytes=sum(path.stat().st_size for path in files),
        index_bytes=(directory / INDEX_DIR / "data.mdb").stat().st_size,
        holdings=_holdings(entries, fingerprints, statements, owners, generations, known or KnownNames()),
        forest=runs[:num_lines_max],
        num_runs_left_out=max(0, len(runs) - num_lines_max),
    )


def _entries(index: Index, txn: Any, progress: Progress) -> dict[tuple[RecordKind, bytes], IndexEntry]:
    tables = {kind: index.db[TABLE_OF_KIND[kind]] for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT)}
    total = sum(txn.stat(table)["entries"] for table in tables.values())
    entries, done = {}, 0
    for kind, table in tables.items():
        for key, value in txn.cursor(db=table):
            entry = unpack_entry(value, key)
            if entry is not None:
                entries[kind, key] = entry
            done += 1
            if done % _PROGRESS_EVERY == 0:
                progress(done, total)
    return entries


def _holdings(
    entries: dict[tuple[RecordKind, bytes], IndexEntry],
    fingerprints: dict[int, bytes],
    statements: dict[bytes, bytes],
    owners: dict[int, bytes],
    generations: dict[int, int],
    known: KnownNames,
) -> list[Holding]:
    groups: dict[tuple[int, int, RecordKind], list[IndexEntry]] = defaultdict(list)
    for (kind, _), entry in entries.items():
        groups[entry.fingerprint_id, entry.tenant_id, kind].append(entry)
    whose = {owner: split_tenant(known.name(owners.get(owner, b"t"))) for _, owner, _ in groups}
    return [
        Holding(
            fingerprint=fingerprints.get(fingerprint, b"").hex(),
            about=fields_of(statements.get(fingerprints.get(fingerprint, b""), b"")),
            tenant=whose[owner][0],
            user=whose[owner][1],
            version=2 if owners.get(owner, b"t")[:1] == b"o" else 1,
            generation=generations.get(owner, 0),
            kind=kind,
            num_records=len(found),
            stored_bytes=sum(entry.extent_bytes for entry in found),
            payload_bytes=sum(entry.payload_bytes for entry in found),
            num_compressed=sum(entry.codec != 0 for entry in found),
            num_quarantined=sum(entry.quarantined for entry in found),
            ages=_ages(found),
        )
        for (fingerprint, owner, kind), found in sorted(groups.items())
    ]


def _ages(entries: list[IndexEntry]) -> dict[str, int]:
    now_ms = wall_ms()
    counts = {name: 0 for _, name in AGES}
    for entry in entries:
        age_s = (now_ms - entry.rank_ms) / 1000
        counts[next(name for bound, name in AGES if age_s < bound)] += 1
    return counts


def _forest(entries: dict[tuple[RecordKind, bytes], IndexEntry]) -> list[Run]:
    """The forest in depth-first order, the most recently used branch first."""
    below: dict[bytes, list[bytes]] = defaultdict(list)
    roots = []
    for (kind, block_hash), entry in entries.items():
        if kind is RecordKind.BLOCK:
            if (RecordKind.BLOCK, entry.parent) in entries:
                below[entry.parent].append(block_hash)
            else:
                roots.append(block_hash)
    runs = []
    waiting = [(0, root) for root in sorted(roots, key=lambda h: entries[RecordKind.BLOCK, h].rank_ms)]
    while waiting:
        depth, first = waiting.pop()
        path = list(_run_of(first, below))
        runs.append(_run(depth, path, entries))
        branches = sorted(below.get(path[-1], ()), key=lambda h: entries[RecordKind.BLOCK, h].rank_ms)
        waiting.extend((depth + 1, branch) for branch in branches)
    return runs


def _run_of(first: bytes, below: dict[bytes, list[bytes]]) -> Iterator[bytes]:
    block_hash = first
    yield block_hash
    while len(below.get(block_hash, ())) == 1:
        block_hash = below[block_hash][0]
        yield block_hash


def _run(depth: int, path: list[bytes], entries: dict[tuple[RecordKind, bytes], IndexEntry]) -> Run:
    blocks = [entries[RecordKind.BLOCK, block_hash] for block_hash in path]
    return Run(
        depth=depth,
        first_position=blocks[0].position,
        last_position=blocks[-1].position,
        num_blocks=len(blocks),
        num_checkpoints=sum((RecordKind.CHECKPOINT, block_hash) in entries for block_hash in path),
        stored_bytes=sum(block.extent_bytes for block in blocks),
        used_s_ago=(wall_ms() - max(block.rank_ms for block in blocks)) / 1000,
        last_hash=path[-1].hex(),
    )


def render(report: StoreReport) -> str:
    """The report as text for a terminal."""
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(report.identity.created_ms / 1000))
    num_records = sum(holding.num_records for holding in report.holdings)
    lines = [
        f"{report.directory}: format {report.identity.version}, created {created}",
        f"{num_records} records in {report.num_segments} segments of {shown_size(report.segment_bytes)}, "
        f"index {shown_size(report.index_bytes)}",
    ]
    if report.holdings:
        lines += ["", text_table(_HEAD, map(_row, report.holdings), num_left=4), ""]
    lines += _about(report)
    if report.forest:
        lines.append("prefixes (tokens, blocks, * checkpoint):")
    for run in report.forest:
        marks = f" *{run.num_checkpoints}" if run.num_checkpoints else ""
        lines.append(
            f"  {'│ ' * run.depth}├─ to token {run.last_position}: {run.num_blocks} blocks, "
            f"{shown_size(run.stored_bytes)}{marks}, used {_ago(run.used_s_ago)}, ends {run.last_hash[:12]}"
        )
    if report.num_runs_left_out:
        lines.append(f"  ... and {report.num_runs_left_out} more runs")
    return "\n".join(lines)


_HEAD: Final = (
    *("namespace", "tenant", "user", "kind", "records", "payload", "on disk", "secret", "version", "bad"),
    *(name for _, name in AGES),
)


def _row(holding: Holding) -> list[str]:
    """A row of the table. Ages of records count from their last use; bad: number of quarantined records."""
    return [
        *(holding.fingerprint[:12], holding.tenant or "(no tenant)", holding.user or "-", holding.kind.name.lower()),
        *(str(holding.num_records), shown_size(holding.payload_bytes), shown_size(holding.stored_bytes)),
        *(str(holding.generation or "-"), str(holding.version)),
        *(str(count) if count else "-" for count in (holding.num_quarantined, *holding.ages.values())),
    ]


def _about(report: StoreReport) -> list[str]:
    """The model and settings that each fingerprint stands for, without digests of files, which tell a reader least."""
    texts = {
        holding.fingerprint[:12]: ", ".join(f"{name} {holding.about[name]}" for name in _TOLD if name in holding.about)
        for holding in report.holdings
        if holding.about
    }
    return ["fingerprints:", *(f"  {name}  {text}" for name, text in texts.items())] if texts else []


def shown_size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _ago(seconds: float) -> str:
    for bound, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < bound:
            return f"{max(seconds, 0) / divisor:.0f} {unit} ago"
    return f"{seconds / 86_400:.0f} d ago"
