"""What the ledger tells about a request: its hits, why the rest missed, and the earlier request most similar to it.

A record holds no text. The block hashes in two records (`antefix.prompt_marks`) tell where their prompts begin to
differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from antefix.errors import InvalidRequest
from antefix.prompt_marks import Parting, parting
from antefix_billing.ledger_files import ledgers_of, read_settled
from antefix_billing.pricing import moment_of
from antefix_billing.usage_record import UsageRecord
from antefix_console.explain.text import ADVICE, FLEET_ADVICE

# Clients see a request's id with one of these prefixes.
_SHOWN_WITH: Final = ("chatcmpl-", "cmpl-", "msg_", "resp_")


def find_record(ledgers: Sequence[Path], request_id: str, tenant: str | None = None) -> UsageRecord:
    """The last record with this id, given with or without the prefix that clients see.

    Raises:  InvalidRequest: no record has it, or records of several tenants do.  LedgerCorrupt: the ledger is damaged.
    """
    prefix = next((each for each in _SHOWN_WITH if request_id.startswith(each)), "")
    wanted = {request_id, request_id.removeprefix(prefix)}
    found = {
        record.tenant: record
        for record in _records(ledgers)
        if record.request_id in wanted and tenant in (None, record.tenant)
    }
    if not found:
        raise InvalidRequest(f"there is no record of request {request_id!r} in {', '.join(map(str, ledgers))}")
    if len(found) > 1:
        raise InvalidRequest(f"several tenants have a request {request_id!r}: say with --tenant whose request is meant")
    return next(iter(found.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Another request, and where the two prompts begin to differ."""

    record: UsageRecord
    parting: Parting


def nearest_before(ledgers: Sequence[Path], record: UsageRecord) -> Neighbour | None:
    """The same user's earlier request that shares most blocks with this one; if several share as many, the last of
    them.
    """
    best: Neighbour | None = None
    for other in _records(ledgers):
        if other.started_us < record.started_us and comparable(record, other):
            found = Neighbour(record=other, parting=parting(record.prompt_marks, other.prompt_marks))
            if best is None or found.parting.blocks_min >= best.parting.blocks_min:
                best = found
    return best


def comparable(one: UsageRecord, other: UsageRecord) -> bool:
    """Whether equal tokens have equal hashes in both records, and both records have hashes."""
    named = all(getattr(one, name) == getattr(other, name) for name in ("tenant", "user", "fingerprint"))
    return named and bool(one.prompt_marks) and bool(other.prompt_marks)


def _records(ledgers: Sequence[Path]) -> Iterator[UsageRecord]:
    for ledger in ledgers_of(ledgers):
        for settled in read_settled(ledger):
            yield settled.record


def record_dict(record: UsageRecord, block_size: int) -> dict[str, Any]:
    hit_blocks = record.cache_hit_tokens // block_size
    return {**record.to_dict(), "blocks": record.prompt_tokens // block_size, "hit_blocks": hit_blocks}


def record_lines(record: UsageRecord, block_size: int) -> Iterator[str]:
    whose = ", ".join(f"{what} {name}" for what, name in (("tenant", record.tenant), ("user", record.user)) if name)
    when = moment_of(record.started_us).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield f"Request {record.request_id}{f' ({whose})' if whose else ''}, {when}: {record.status.value}"
    prompt, hit = record.prompt_tokens, record.cache_hit_tokens
    if not prompt:
        yield "  no prompt token was worked on to the end."
        return
    if record.worker:
        yield from _of_a_fleet(record)
        return
    tiers = f"memory {record.hit_memory_tokens}, store {record.hit_store_tokens}; plan {record.restore_plan or '-'}"
    if record.hit_tiers:
        tiers += f"; stores {record.hit_tiers}"
    yield f"  {hit} of {prompt} prompt tokens were hits ({hit / prompt:.0%}: {tiers})."
    if record.last_hit_hash:
        yield f"  The last block that was hit has the hash {record.last_hit_hash}."
    if record.miss_reason:
        first, reason = hit // block_size, record.miss_reason
        yield f"  The first block that missed is block {first}, from token {first * block_size} on: {reason}."
        yield f"  What to do: {ADVICE[reason]}"
    if record.write_error:
        yield f"  What was computed could not all be stored: {record.write_error}"
    if record.prefix_volatile:
        yield (
            "  This client's prompts begin with something that changes and then say the same, so nothing behind it can"
            " hit. Put it last, or move it with --prefix-rules."
        )


def _of_a_fleet(record: UsageRecord) -> Iterator[str]:
    """Lines about a request to another engine of a fleet: the hits that the engine reported, and those that the router
    expected.
    """
    prompt, hit = record.prompt_tokens, record.cache_hit_tokens
    said = f"{record.evidence.label} by {record.worker}"
    yield f"  {hit} of {prompt} prompt tokens were hits ({hit / prompt:.0%}), {said}."
    yield f"  The router expected {record.expected_hit_tokens} there, from what it knew of that worker's cache."
    if record.miss_reason:
        yield f"  What missed begins at token {hit}: {record.miss_reason}."
        yield f"  What to do: {FLEET_ADVICE[record.miss_reason]}"
