"""Writes the wanted records of a segment to a new segment and deletes the old one: to purge a user's records, or to
drop damaged ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from antefix.errors import BlockCorrupt
from antefix.objects.catalog import Catalog, read_headers, read_object
from antefix.objects.segment_object import SegmentRef, pack_segment, scan_segment
from antefix.record import OWNER_BYTES, Buffer, RecordKind
from antefix.secret import TENANT_BYTES
from antefix.store_files.record_header import RecordHeader

_NO_USER = bytes(OWNER_BYTES - TENANT_BYTES)


async def rewrite(catalog: Catalog, ref: SegmentRef, keep: Callable[[RecordHeader], bool]) -> int:
    """Keep only these records, out of the valid records of a segment. Returns how many records were kept; if none is
    kept, the segment is only deleted.

    The new object is there before the old one goes: readers find one or the other.
    Raises:  Unavailable.  ObjectGone.
    """
    data = await read_object(catalog.bucket, ref.name, ref.nbytes)
    drafts: list[tuple[RecordHeader, Buffer]] = []
    statements: list[bytes] = []
    with contextlib.suppress(BlockCorrupt):
        for header, stored in await asyncio.to_thread(lambda: list(scan_segment(data, ref))):
            if header.kind is RecordKind.STATEMENT:
                statements.append(bytes(stored))
            elif header.kind is ref.kind and header.tenant[:TENANT_BYTES] == ref.tenant and keep(header):
                drafts.append((header, stored))
    if drafts:
        created_ms = catalog.clock_ms()
        built = pack_segment(drafts, created_ms=created_ms, expires_ms=ref.expires_ms, statements=statements)
        await catalog.bucket.put(built.ref.name, built.parts)
        await catalog.add([(built.ref, built.records)])
    await catalog.bucket.delete([ref.name])
    catalog.lose(ref.id)
    return len(drafts)


async def purge_owner(catalog: Catalog, owner: bytes) -> int:
    """Delete all records of an owner; without a user, all records of a tenant. Returns how many went.

    Raises:  Unavailable: some are still there.
    """
    await catalog.refresh()
    tenant, user = owner[:TENANT_BYTES], owner[TENANT_BYTES:]
    num_gone = 0
    for ref in [ref for ref in (*catalog.segments(), *catalog.expired()) if ref.tenant == tenant]:
        with contextlib.suppress(BlockCorrupt):
            headers = await read_headers(catalog.bucket, ref)
            meant = [header for header in headers if user == _NO_USER or header.tenant == owner]
            num_gone += len(meant)
            if not meant:
                continue
            if len(meant) < len(headers):
                await rewrite(catalog, ref, lambda header: header.tenant != owner)
                continue
        await catalog.bucket.delete([ref.name])
        catalog.lose(ref.id)
    return num_gone
