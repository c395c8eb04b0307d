"""Verifies a ledger: is its chain intact, and does the store's own log support every billed hit? Verification only
reads the ledger and the log, and trusts neither of them.

A record's hit is supported if its last block was stored before the request ended and, for tokens billed from the
store's tier, was read between the request's start and end. A hit in a worker's memory is supported if its block was
stored before, without a read; or if an earlier request computed that prefix and the store did not take it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from antefix.errors import AntefixError
from antefix_billing.adjustment import Adjusted, AdjustmentKind
from antefix_billing.anchor import Anchor
from antefix_billing.anchor_check import AnchorVerdict, check_anchors
from antefix_billing.archive import check_archive
from antefix_billing.hit_evidence import CLOCK_SLACK_US, HitEvidence
from antefix_billing.ledger_files import Settled, adjusted_of, read_entries, settled_of, source_of
from antefix_billing.ledger_format import EntryKind
from antefix_billing.pruned import pruned_of
from antefix_billing.usage_record import OpenEntry

_NUM_EXAMPLES_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedVerdict:
    """The result of checking the summaries of pruned entries.  to: the last pruned entry.  records: how many records
    were pruned, by the summaries.  unsigned: summaries without a signature by a known key; None if no key was given.
    archive: whether the archive has the files and they add up to the summaries; None if no archive was given.
    """

    to: int
    summaries: int
    records: int
    unsigned: int | None
    archive: bool | None
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults and not self.unsigned


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of verifying one ledger.

    head: the sequence number and the hash of the last entry. These should be kept elsewhere: a ledger whose end was cut
    off is still a valid chain, but no longer has this entry. unsupported_hits: None if no log of a store was given.
    """

    records: int
    open_requests: int
    chain_ok: bool
    chain_error: str
    head_sequence: int
    head_hash: str
    head_ok: bool
    duplicates: int
    unsupported_hits: int | None
    unsupported_examples: tuple[str, ...]
    adjustments: int = 0
    anchors: AnchorVerdict | None = None
    pruned: PrunedVerdict | None = None

    @property
    def ok(self) -> bool:
        is_anchored = self.anchors is None or self.anchors.ok
        is_whole = self.chain_ok and self.head_ok and (self.pruned is None or self.pruned.ok)
        return is_whole and is_anchored and not self.duplicates and not self.unsupported_hits

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """The results for several ledgers of one deployment, by directory.

    charged_twice: requests that two ledgers charged without a refund by an adjustment.  missing_ledgers: ledgers that
    anchors name and that are not among these.
    """

    ledgers: tuple[tuple[str, Verdict], ...]
    charged_twice: int
    missing_ledgers: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(verdict.ok for _, verdict in self.ledgers) and not self.charged_twice and not self.missing_ledgers

    def to_json(self) -> str:
        """For one ledger, the result of that ledger. For several, the sums and the result of each."""
        verdicts = [verdict for _, verdict in self.ledgers]
        if len(verdicts) == 1 and not self.missing_ledgers:
            return verdicts[0].to_json()
        unsupported = [verdict.unsupported_hits for verdict in verdicts if verdict.unsupported_hits is not None]
        sums = {
            "ok": self.ok,
            "records": sum(verdict.records for verdict in verdicts),
            "open_requests": sum(verdict.open_requests for verdict in verdicts),
            "chain_ok": all(verdict.chain_ok for verdict in verdicts),
            "head_ok": all(verdict.head_ok for verdict in verdicts),
            "missing_ledgers": list(self.missing_ledgers),
            "duplicates": sum(verdict.duplicates for verdict in verdicts) + self.charged_twice,
            "unsupported_hits": sum(unsupported) if unsupported else None,
        }
        each = [{"ledger": name, "ok": verdict.ok, **asdict(verdict)} for name, verdict in self.ledgers]
        return json.dumps({**sums, "ledgers": each}, indent=2)


@dataclass(slots=True)
class _Chain:
    """One ledger as read."""

    settled: list[Settled]
    open_requests: int = 0
    sequence: int = 0
    hash: bytes = b""
    anchor_seen: bool = False
    error: str = ""
    adjusted: list[Adjusted] = field(default_factory=list)
    hashes: dict[int, bytes] = field(default_factory=dict)
    first: int = 1


def verify(
    ledger: Path,
    *,
    store_log: Path | Sequence[Path] | None = None,
    anchor: tuple[int, str] | None = None,
    slack_us: int = CLOCK_SLACK_US,
) -> Verdict:
    """Read the whole ledger and, if given, the logs of one or all stores.

    anchor: the last entry of the ledger as an earlier run reported it. The ledger must still have this entry with this
    hash.
    """
    chain = _read(ledger, anchor, ())
    evidence = None if store_log is None else HitEvidence.of(chain.settled, store_log)
    return _verdict(chain, evidence, slack_us, has_anchor=anchor is not None)


def verify_all(
    ledgers: Sequence[Path],
    *,
    store_log: Path | Sequence[Path] | None,
    anchors: Mapping[bytes, tuple[int, str]],
    signed: Sequence[Anchor] = (),
    public_keys: Sequence[bytes] = (),
    are_all: bool = False,
    archive: str = "",
) -> Verdicts:
    """Verify all ledgers of a deployment against the logs of its stores.

    anchors: heads that earlier runs printed, by the ledger's source; see `verify`.  signed: anchors and receipts of any
    of the ledgers.  public_keys: keys whose signatures on anchors and on summaries of pruned entries are accepted; if
    empty, signatures are not checked.  are_all: `ledgers` is meant to be complete, so a ledger that only an anchor
    names counts as missing.  archive: the place of pruned segments.
    """
    named = [(ledger, anchors.get(source_of(ledger))) for ledger in ledgers]
    by_source = {source_of(ledger): [each for each in signed if each.source == source_of(ledger)] for ledger in ledgers}
    chains = [_read(ledger, anchor, by_source[source_of(ledger)]) for ledger, anchor in named]
    verdicts = [
        check_anchors(
            by_source[source_of(ledger)],
            chain.hashes,
            first=chain.first,
            head=chain.sequence,
            public_keys=public_keys,
            chain_error=chain.error,
        )
        if signed
        else None
        for ledger, chain in zip(ledgers, chains, strict=True)
    ]
    missing = {each.source.hex() for each in signed if each.source not in by_source} if are_all else set()
    settled = [item for chain in chains for item in chain.settled]
    evidence = None if store_log is None else HitEvidence.of(settled, store_log)
    return Verdicts(
        ledgers=tuple(
            (
                str(ledger),
                replace(
                    _verdict(chain, evidence, CLOCK_SLACK_US, has_anchor=anchor is not None),
                    anchors=anchored,
                    pruned=_check_pruned(ledger, public_keys, archive),
                ),
            )
            for (ledger, anchor), chain, anchored in zip(named, chains, verdicts, strict=True)
        ),
        charged_twice=_num_charged_twice(chains),
        missing_ledgers=tuple(sorted(missing)),
    )


def _check_pruned(ledger: Path, public_keys: Sequence[bytes], archive: str) -> PrunedVerdict | None:
    """None if nothing was pruned. Returns None also if the summaries are damaged, because reading the chain reports
    that.
    """
    try:
        summaries = pruned_of(ledger)
    except AntefixError:
        return None
    if not summaries:
        return None
    faults = list(check_archive(ledger, archive)) if archive else []
    foreign = [each for each in summaries if each.source != source_of(ledger)]
    faults += [f"the summary of entries {each.first} to {each.last} is another ledger's" for each in foreign]
    return PrunedVerdict(
        to=summaries[-1].last,
        summaries=len(summaries),
        records=sum(total.records for each in summaries for total in each.totals),
        unsigned=sum(not each.is_signed_by(public_keys) for each in summaries) if public_keys else None,
        archive=not faults if archive else None,
        faults=tuple(faults),
    )


def _verdict(chain: _Chain, evidence: HitEvidence | None, slack_us: int, *, has_anchor: bool) -> Verdict:
    unsupported = None if evidence is None else evidence.unsupported(chain.settled, slack_us)
    return Verdict(
        records=len(chain.settled),
        open_requests=chain.open_requests,
        chain_ok=not chain.error,
        chain_error=chain.error,
        head_sequence=chain.sequence,
        head_hash=chain.hash.hex(),
        head_ok=not has_anchor or chain.anchor_seen,
        duplicates=_num_duplicates(chain.settled),
        unsupported_hits=None if unsupported is None else len(unsupported),
        adjustments=len(chain.adjusted),
        unsupported_examples=tuple(unsupported[:_NUM_EXAMPLES_MAX]) if unsupported else (),
    )


def _num_charged_twice(chains: Sequence[_Chain]) -> int:
    """Requests that several ledgers ended and charged, without a refund of the excess."""
    given_back = {
        (item.adjustment.of_source, item.adjustment.of_event)
        for chain in chains
        for item in chain.adjusted
        if item.adjustment.kind is AdjustmentKind.CHARGED_TWICE
    }
    ended = Counter(
        key
        for chain in chains
        for key in {
            item.record.key
            for item in chain.settled
            if item.record.is_final and (item.record.source, item.record.event_id) not in given_back
        }
    )
    return sum(count - 1 for count in ended.values())


def _read(ledger: Path, anchor: tuple[int, str] | None, signed: Sequence[Anchor]) -> _Chain:
    chain, opened = _Chain(settled=[]), set[str]()
    wanted = {each.sequence for each in signed}
    try:
        chain.hashes.update((each.last, each.hash) for each in pruned_of(ledger))
        for previous, entry in read_entries(ledger):
            if not chain.sequence:
                chain.first = entry.sequence
            chain.sequence, chain.hash = entry.sequence, entry.hash
            if entry.sequence in wanted:
                chain.hashes[entry.sequence] = entry.hash
            chain.anchor_seen = chain.anchor_seen or (entry.sequence, entry.hash.hex()) == anchor
            if entry.kind is EntryKind.OPEN:
                opened.add(OpenEntry.from_payload(entry.payload).key)
                continue
            if entry.kind is EntryKind.ADJUST:
                chain.adjusted.append(adjusted_of(previous, entry))
            if entry.kind is not EntryKind.SETTLE:
                continue
            settled = settled_of(previous, entry)
            opened.discard(settled.record.key)
            chain.settled.append(settled)
    except AntefixError as err:
        chain.error = str(err)
    chain.open_requests = len(opened)
    return chain


def _num_duplicates(settled: list[Settled]) -> int:
    """Records beyond one per attempt of a request, and charges beyond one per request."""
    seen: set[str] = set()
    final: set[str] = set()
    num_duplicates = 0
    for item in settled:
        record = item.record
        twice = record.event_id in seen or (record.is_final and record.key in final)
        num_duplicates += twice
        seen.add(record.event_id)
        if record.is_final:
            final.add(record.key)
    return num_duplicates
