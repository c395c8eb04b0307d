"""Object tiers of small records in a directory, so that a test of a whole tier takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog
from antefix.objects.object_tier import ObjectTier
from antefix.objects.object_writer import ObjectSettings, ObjectWriter
from antefix.record import Record, RecordKind
from antefix.store_files.segment_reader import wall_ms
from tests.kvstore.small_store import FINGERPRINT, Prompt, owner

OWNER = owner("")
DAY_S = 86_400.0


def url_of(directory: Path) -> str:
    return f"file://{directory}"


async def upload(
    url: str, records: Sequence[Record], *, clock_ms: Callable[[], int] = wall_ms, **settings: object
) -> ObjectWriter:
    """Upload records as one host does."""
    settings = {"ttl_s": dict.fromkeys(RecordKind, DAY_S), "segment_bytes": 4096, **settings}
    writer = ObjectWriter(Catalog(open_bucket(url), clock_ms=clock_ms), ObjectSettings(**settings))  # type: ignore[arg-type]
    await writer.catalog.refresh()
    await writer.write(records)
    return writer


def tier_of(url: str, **settings: object) -> ObjectTier:
    """The tier as a new host sees it."""
    return ObjectTier(open_bucket(url), **settings)  # type: ignore[arg-type]


async def num_restored(tier: ObjectTier, prompt: Prompt) -> int:
    """The number of leading blocks that are restored. Every byte of them must be right."""
    into = prompt.buffers()
    num_good = await tier.get_blocks(prompt.hashes, into, fingerprint=FINGERPRINT, tenant=OWNER)
    assert [bytes(each) for each in into[:num_good]] == [prompt.payload(number) for number in range(num_good)]
    return num_good
