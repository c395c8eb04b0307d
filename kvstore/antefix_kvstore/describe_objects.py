"""What an object tier holds, by namespace, owner, kind and age. Only names and footers of objects are read, also while
the object store is in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from antefix.block import fields_of
from antefix.cache_tenant import split_tenant
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog, all_headers
from antefix.objects.segment_object import SegmentRef
from antefix.record import RecordKind
from antefix.store_files.owners import KnownNames
from antefix.store_files.record_format import Codec, RecordFlag
from antefix.store_files.record_header import RecordHeader
from antefix.text_table import text_table
from antefix_kvstore.describe_store import AGES, shown_size
from antefix_kvstore.object_contents import statements_of


@dataclass(slots=True, kw_only=True)
class ObjectHolding:
    """Records of one namespace (fingerprint), owner and kind. ages: number of records by time since their upload."""

    fingerprint: str
    about: dict[str, Any]
    tenant: str
    user: str
    kind: RecordKind
    num_records: int = 0
    stored_bytes: int = 0
    payload_bytes: int = 0
    num_compressed: int = 0
    num_encrypted: int = 0
    ages: dict[str, int] = field(default_factory=lambda: {name: 0 for _, name in AGES})


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectReport:
    """num_twice: records that are in more than one segment. num_unreadable: segments without a valid footer.

    index_bytes: memory that the index takes in a process that reads the object store.
    """

    url: str
    num_segments: int
    segment_bytes: int
    num_records: int
    num_twice: int
    num_expired_segments: int
    num_unreadable: int
    index_bytes: int
    holdings: list[ObjectHolding]


async def inspect_objects(url: str, *, known: KnownNames | None = None) -> ObjectReport:
    """known: tenants' names, shown instead of their digests.

    Raises:  ConfigError: the URL names no object store.  Unavailable: the object store does not answer.
    """
    bucket = open_bucket(url)
    try:
        catalog = Catalog(bucket)
        await catalog.refresh()
        segments = await all_headers(catalog)
        said = await statements_of(catalog, [ref for ref, _ in segments])
    finally:
        await bucket.close()
    copies = Counter((header.kind, header.hash) for _, headers in segments for header in headers)
    return ObjectReport(
        url=url,
        num_segments=len(segments),
        segment_bytes=sum(ref.nbytes for ref, _ in segments),
        num_records=sum(copies.values()),
        num_twice=sum(1 for count in copies.values() if count > 1),
        num_expired_segments=len(catalog.expired()),
        num_unreadable=catalog.num_unreadable,
        index_bytes=catalog.nbytes,
        holdings=_holdings(segments, said, known or KnownNames(), catalog.clock_ms()),
    )


def _holdings(
    segments: list[tuple[SegmentRef, list[RecordHeader]]], said: dict[bytes, bytes], known: KnownNames, now_ms: int
) -> list[ObjectHolding]:
    found: dict[tuple[bytes, bytes, RecordKind], ObjectHolding] = {}
    for _, headers in segments:
        for header in headers:
            key = (header.fingerprint, header.owner, header.kind)
            if key not in found:
                tenant, user = split_tenant(known.name(header.owner))
                found[key] = ObjectHolding(
                    fingerprint=header.fingerprint.hex(),
                    about=fields_of(said.get(header.fingerprint, b"")),
                    tenant=tenant,
                    user=user,
                    kind=header.kind,
                )
            _count(found[key], header, (now_ms - header.created_ms) / 1000)
    return sorted(found.values(), key=lambda each: (each.fingerprint, each.tenant, each.user, each.kind))


def _count(holding: ObjectHolding, header: RecordHeader, age_s: float) -> None:
    holding.num_records += 1
    holding.stored_bytes += header.extent_bytes
    holding.payload_bytes += header.payload_bytes
    holding.num_compressed += header.codec is Codec.PLANES_ZSTD
    holding.num_encrypted += bool(header.flags & RecordFlag.ENCRYPTED)
    holding.ages[next(name for limit_s, name in AGES if age_s < limit_s)] += 1


_HEAD: Final = (
    *("namespace", "tenant", "user", "kind", "records", "payload", "stored", "coded", "encrypted"),
    *(name for _, name in AGES),
)


def render_objects(report: ObjectReport) -> str:
    """The report as text for a terminal."""
    return "\n".join(_lines(report))


def _lines(report: ObjectReport) -> Iterator[str]:
    yield (
        f"{report.url}: {report.num_records} records in {report.num_segments} segments of"
        f" {shown_size(report.segment_bytes)}; each reader's index takes {shown_size(report.index_bytes)}"
    )
    if report.num_twice:
        yield (
            f"{report.num_twice} records were uploaded more than once; the older copies are deleted when their time"
            " to live is over"
        )
    if report.num_expired_segments:
        yield f"{report.num_expired_segments} segments are past their time to live and wait to be deleted"
    if report.num_unreadable:
        yield f"{report.num_unreadable} segments have no sound footer: antefix fsck {report.url} --repair"
    if report.holdings:
        yield ""
        yield text_table(_HEAD, map(_row, report.holdings), num_left=4)


def _row(holding: ObjectHolding) -> list[str]:
    """A row of the table. Ages count from the upload."""
    return [
        *(holding.fingerprint[:12], holding.tenant or "(no tenant)", holding.user or "-", holding.kind.name.lower()),
        *(str(holding.num_records), shown_size(holding.payload_bytes), shown_size(holding.stored_bytes)),
        *(str(count) if count else "-" for count in (holding.num_compressed, holding.num_encrypted)),
        *(str(count) if count else "-" for count in holding.ages.values()),
    ]
