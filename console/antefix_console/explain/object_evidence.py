"""What an object store tells about a prompt's blocks. Names, the index and footers of the object store are read, never
payloads.
"""

from __future__ import annotations

from collections.abc import Mapping

from antefix.miss_reason import MissReason
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog, all_headers
from antefix.record import RecordKind
from antefix.store_files.record_header import RecordHeader
from antefix_console.explain.block_evidence import BlockEvidence, NamedChain, RecordPlace


async def in_object_tier(url: str, names: NamedChain) -> list[BlockEvidence]:
    """Evidence of each block of the prompt, in order.

    Raises:  ConfigError: the URL names no object store.  Unavailable: the object store does not answer.
    """
    bucket = open_bucket(url)
    try:
        catalog = Catalog(bucket)
        await catalog.refresh()
        places = [*catalog.find(RecordKind.BLOCK, names.hashes), *catalog.find(RecordKind.CHECKPOINT, names.hashes)]
        used = {place.segment.id for place in places if place is not None}
        headers = {
            (header.kind, header.hash): header
            for _, found in await all_headers(catalog, lambda ref: ref.id in used)
            for header in found
        }
    finally:
        await bucket.close()
    return [_block(number, name, headers, catalog.clock_ms()) for number, name in enumerate(names.hashes)]


def _block(
    number: int, name: bytes, headers: Mapping[tuple[RecordKind, bytes], RecordHeader], now_ms: int
) -> BlockEvidence:
    block, checkpoint = headers.get((RecordKind.BLOCK, name)), headers.get((RecordKind.CHECKPOINT, name))
    return BlockEvidence(
        index=number,
        hash=name,
        reason=MissReason.FIRST_SEEN if block is None else MissReason.NONE,
        place=None if block is None else _place(block, now_ms),
        checkpoint=None if checkpoint is None else _place(checkpoint, now_ms),
        detail="not in the object tier" if block is None else "",
    )


def _place(header: RecordHeader, now_ms: int) -> RecordPlace:
    return RecordPlace(
        segment=header.segment,
        offset=header.offset,
        stored_bytes=header.stored_bytes,
        payload_bytes=header.payload_bytes,
        codec=header.codec.name.lower(),
        expires_s=(header.expires_ms - now_ms) / 1000 if header.expires_ms else 0.0,
        pinned_s=0.0,
    )
