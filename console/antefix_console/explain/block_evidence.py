"""What a store's directory tells about a prompt's blocks. The index, the log and, if requested, the payloads
are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from antefix.miss_reason import MissReason
from antefix.record import RecordKind
from antefix.store_files.gone_blocks import remembered
from antefix.store_files.hit_log import StoreEventKind, read_store_log
from antefix.store_files.index import Index
from antefix.store_files.record_format import Codec, IndexEntry
from antefix.store_files.segment_reader import StoreReader, wall_ms

# Miss reasons, the most informative first.
_TELLING: Final = {
    reason: number
    for number, reason in enumerate(
        (MissReason.NONE, MissReason.CORRUPT, MissReason.EXPIRED, MissReason.EVICTED, MissReason.FINGERPRINT_DIFFERS)
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPlace:
    """A record's place and lifetime. expires_s, pinned_s: seconds from now, 0 for never; negative numbers are seconds
    since then.
    """

    segment: int
    offset: int
    stored_bytes: int
    payload_bytes: int
    codec: str
    expires_s: float
    pinned_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEvidence:
    """Evidence about block `index` of the prompt. reason: why the block would miss; NONE if it is stored.

    checkpoint: the window state after the block, if it is stored and readable.
    checkpoint_lost: why a checkpoint in the index cannot be used; "" if there is none, or it can be used.
    store: which of several stores has the block.
    cached: whether this host's page cache had the block, by samples; None: not stored, or not known.
    """

    index: int
    hash: bytes
    reason: MissReason
    place: RecordPlace | None = None
    checkpoint: RecordPlace | None = None
    checkpoint_lost: str = ""
    detail: str = ""
    store: str = ""
    cached: bool | None = None

    @property
    def state(self) -> str:
        """A word for the reader: `stored`, or the reason why the block would miss."""
        return self.reason.value or "stored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Whether the store has KV under this prompt's fingerprint, and how many other fingerprints it has."""

    is_known: bool
    num_others: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedChain:
    """A prompt's names under one fingerprint. label: describes the fingerprint to the reader.

    reason: the miss reason of a block that is stored under this fingerprint only.
    """

    label: str
    fingerprint: bytes
    hashes: Sequence[bytes]
    reason: MissReason = MissReason.FINGERPRINT_DIFFERS


def gather(
    directory: Path | Sequence[Path],
    names: NamedChain,
    others: Sequence[NamedChain] = (),
    *,
    more: Mapping[str, Sequence[BlockEvidence]] | None = None,
    log: Path | Sequence[Path] | None = None,
    check: bool = False,
) -> list[BlockEvidence]:
    """Evidence of each block of the prompt, in order. With several stores, the most informative evidence for each
    block.

    others: the names of the same tokens under other fingerprints, which may explain a miss.  more: evidence from
    further tiers, by their names.  log: the store's log, which tells blocks that were evicted from those never seen.
    check: read every stored block and verify its checksum.
    Raises:  Unavailable: there is no store in `directory`.
    """
    directories = [directory] if isinstance(directory, Path) else list(directory)
    logs = [] if log is None else [log] if isinstance(log, Path) else list(log)
    found = [_in_store(each, names, others, logs, check=check) for each in directories]
    elsewhere = {number: other for _, of_others in reversed(found) for number, other in of_others.items()}
    evidence = [*(rows for rows, _ in found), *(more or {}).values()]
    named = [*map(str, directories), *(more or {})] if len(evidence) > 1 else [""]
    return _with_gaps([_most_telling(rows, named) for rows in zip(*evidence, strict=True)], elsewhere)


def _in_store(
    directory: Path, names: NamedChain, others: Sequence[NamedChain], logs: Sequence[Path], *, check: bool
) -> tuple[list[BlockEvidence], dict[int, NamedChain]]:
    """One store's evidence of each block, and the blocks that it has under other fingerprints."""
    reader = StoreReader(directory)
    try:
        # Before the check reads all blocks.
        cached = reader.held(names.hashes, fingerprint=names.fingerprint).cached
        broken = _check(reader, names) if check else {}
        now_ms = wall_ms()
        with reader.index.txn() as txn:
            known = frozenset[bytes]().union(*(_stored_once(names.hashes, log) for log in logs))
            elsewhere = _elsewhere(reader.index, txn, others, now_ms)
            blocks = [_block(reader, txn, number, names, known, broken, now_ms) for number in range(len(names.hashes))]
    finally:
        reader.close()
    return [_with_cached(block, cached) for block in blocks], elsewhere


def _with_cached(block: BlockEvidence, cached: Sequence[tuple[int, int]] | None) -> BlockEvidence:
    if cached is None or block.reason is not MissReason.NONE:
        return block
    return replace(block, cached=any(start <= block.index < stop for start, stop in cached))


def _most_telling(rows: Sequence[BlockEvidence], named: Sequence[str]) -> BlockEvidence:
    """The most informative of several stores' evidence of a block. named: the stores' names, where there are
    several.
    """
    best = min(range(len(rows)), key=lambda number: (_TELLING.get(rows[number].reason, len(_TELLING)), number))
    block = replace(rows[best], store=named[best] if rows[best].reason is MissReason.NONE else "")
    if block.checkpoint is not None:
        return block
    with_state = next((row for row in rows if row.checkpoint is not None), block)
    return replace(block, checkpoint=with_state.checkpoint, checkpoint_lost=with_state.checkpoint_lost)


def holdings(directories: Path | Sequence[Path], fingerprint: bytes) -> Holdings:
    """Raises:  Unavailable: there is no store in one of them."""
    digests: set[bytes] = set()
    for directory in [directories] if isinstance(directories, Path) else directories:
        reader = StoreReader(directory)
        try:
            with reader.index.txn() as txn:
                digests |= set(reader.index.fingerprints(txn).values())
        finally:
            reader.close()
    return Holdings(is_known=fingerprint in digests, num_others=len(digests - {fingerprint}))


def statements(directory: Path) -> dict[bytes, bytes]:
    """The statements of the store's fingerprints, where it has them.  Raises:  Unavailable: as above."""
    reader = StoreReader(directory)
    try:
        with reader.index.txn() as txn:
            digests = reader.index.fingerprints(txn).values()
            said = {digest: reader.index.statement(txn, digest) for digest in digests}
    finally:
        reader.close()
    return {digest: statement for digest, statement in said.items() if statement}


def _block(
    reader: StoreReader,
    txn: Any,
    number: int,
    names: NamedChain,
    known: frozenset[bytes],
    broken: Mapping[int, str],
    now_ms: int,
) -> BlockEvidence:
    name, index = names.hashes[number], reader.index
    entry = index.entry(txn, RecordKind.BLOCK, name)
    if entry is None:
        # The block's window state may be here although the block is not: several stores may share a chain.
        checkpoint, lost = _checkpoint(index, txn, name, names, now_ms)
        return replace(_missing(reader.directory, number, name, known), checkpoint=checkpoint, checkpoint_lost=lost)
    place = _place(entry, now_ms)
    reason, detail = MissReason.NONE, ""
    if entry.fingerprint_id != index.fingerprint_id(txn, names.fingerprint):
        reason, detail = (
            MissReason.FINGERPRINT_DIFFERS,
            "a record of this name has another fingerprint: it is never served",
        )
    elif entry.quarantined or number in broken:
        reason = MissReason.CORRUPT
        detail = broken.get(number, "quarantined: it failed a check; recomputing replaces it")
    elif not entry.live(now_ms):
        reason, detail = (
            MissReason.EXPIRED,
            f"unused for longer than its time to live, {entry.ttl_s} s; the space is reclaimed when needed",
        )
    checkpoint, lost = _checkpoint(index, txn, name, names, now_ms)
    return BlockEvidence(
        index=number,
        hash=name,
        reason=reason,
        place=place,
        checkpoint=checkpoint,
        checkpoint_lost=lost,
        detail=detail,
    )


def _missing(directory: Path, number: int, name: bytes, known: frozenset[bytes]) -> BlockEvidence:
    reason = remembered(directory, name)
    if reason is not MissReason.FIRST_SEEN:
        detail = "the store remembers that it dropped the block"
    elif name in known:
        reason, detail = MissReason.EVICTED, "the store's log has the block, but the index does not"
    else:
        reason, detail = MissReason.FIRST_SEEN, "never stored" if known else "never stored, or dropped long ago"
    return BlockEvidence(index=number, hash=name, reason=reason, detail=detail)


def _checkpoint(index: Index, txn: Any, name: bytes, names: NamedChain, now_ms: int) -> tuple[RecordPlace | None, str]:
    """The checkpoint after a block, or why the checkpoint in the index cannot be used."""
    entry = index.entry(txn, RecordKind.CHECKPOINT, name)
    if entry is None:
        return None, ""
    if entry.fingerprint_id != index.fingerprint_id(txn, names.fingerprint):
        return None, "has another fingerprint"
    if entry.quarantined:
        return None, "failed a check and is quarantined"
    if not entry.live(now_ms):
        return None, f"expired {human_s((now_ms - entry.expires_ms) / 1000)} ago"
    return _place(entry, now_ms), ""


def human_s(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _place(entry: IndexEntry, now_ms: int) -> RecordPlace:
    return RecordPlace(
        segment=entry.segment,
        offset=entry.offset,
        stored_bytes=entry.stored_bytes,
        payload_bytes=entry.payload_bytes,
        codec=Codec(entry.codec).name.lower(),
        expires_s=(entry.expires_ms - now_ms) / 1000 if entry.expires_ms else 0.0,
        pinned_s=(entry.pinned_ms - now_ms) / 1000 if entry.pinned_ms else 0.0,
    )


def _check(reader: StoreReader, names: NamedChain) -> dict[int, str]:
    """Read every block that can be located. Returns the damaged blocks by number, each with the reason."""
    broken: dict[int, str] = {}
    for number, name in enumerate(names.hashes):
        with reader.index.txn() as txn:
            entry = reader.index.entry(txn, RecordKind.BLOCK, name)
        if entry is None or entry.quarantined:
            continue
        payload, outcome = reader.read(RecordKind.BLOCK, name, fingerprint=names.fingerprint)
        if payload is None and outcome.suspects:
            broken[number] = "its bytes on disk are not what the index says: it will be quarantined when it is read"
    return broken


def _stored_once(hashes: Sequence[bytes], log: Path) -> frozenset[bytes]:
    wanted = {name.hex(): name for name in hashes}
    events = (event for event in read_store_log(log) if event.kind is StoreEventKind.STORED)
    return frozenset(wanted[event.hash] for event in events if event.hash in wanted)


def _elsewhere(index: Index, txn: Any, others: Sequence[NamedChain], now_ms: int) -> dict[int, NamedChain]:
    """Blocks that are stored under another fingerprint, by number."""
    found: dict[int, NamedChain] = {}
    for names in others:
        fingerprint_id = index.fingerprint_id(txn, names.fingerprint)
        if fingerprint_id is None:
            continue
        for number, name in enumerate(names.hashes):
            entry = index.entry(txn, RecordKind.BLOCK, name)
            if entry is None or not entry.live(now_ms) or entry.fingerprint_id != fingerprint_id:
                break
            found.setdefault(number, names)
    return found


def _with_gaps(blocks: list[BlockEvidence], elsewhere: Mapping[int, NamedChain]) -> list[BlockEvidence]:
    """Mark blocks after a missing block, which cannot be hit, and blocks that only another fingerprint has."""
    out: list[BlockEvidence] = []
    is_reachable = True
    for block in blocks:
        reason, detail = block.reason, block.detail
        if reason is MissReason.NONE and not is_reachable:
            reason, detail = MissReason.UNREACHABLE, "it is stored, but an earlier block is not: a hit is a prefix"
        elif reason is MissReason.FIRST_SEEN and block.index in elsewhere:
            reason = elsewhere[block.index].reason
            detail = f"these tokens are stored, but under {elsewhere[block.index].label}"
        is_reachable &= reason is MissReason.NONE
        out.append(replace(block, reason=reason, detail=detail))
    return out
