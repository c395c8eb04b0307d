"""The object tier with a real S3 server, intact and with faults: no wrong byte, no call that hangs, bounded memory."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest

from antefix.errors import AntefixError, Unavailable
from antefix.objects.bucket import open_bucket
from antefix.objects.object_tier import ObjectTier
from antefix.record import RecordKind
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.objects.any_bucket import keeps_what_any_bucket_must
from tests.objects.faulty_proxy import HARMS, Harm, faulty_proxy
from tests.objects.small_tier import OWNER, num_restored, tier_of, upload
from tests.waiting import AT_MOST_S

pytestmark = [pytest.mark.s3, pytest.mark.services]
PROMPT = Prompt(list(range(BLOCK * 60)), payload_bytes=60_000)
NUM_BLOCKS = len(PROMPT.hashes)


async def test_a_bucket_keeps_what_any_bucket_must(url: str) -> None:
    await keeps_what_any_bucket_must(open_bucket(url))


async def test_any_host_finds_and_reads_what_was_uploaded(url: str) -> None:
    await upload(url, [*PROMPT.blocks(), PROMPT.checkpoint(30)], segment_bytes=1 << 20)
    tier = tier_of(url)
    assert (await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT)).num_leading == NUM_BLOCKS
    assert await num_restored(tier, PROMPT) == NUM_BLOCKS
    payload = await tier.get(RecordKind.CHECKPOINT, PROMPT.hashes[30], fingerprint=FINGERPRINT, tenant=OWNER)
    assert payload == PROMPT.payload(30, RecordKind.CHECKPOINT)
    await tier.close()


async def read_under_harm(tier: ObjectTier, num_reads: int) -> tuple[int, int]:
    """The number of complete reads, and of reads that failed and count as a miss. Wrong bytes fail the test."""
    whole = failed = 0
    for number in range(num_reads):
        try:
            async with asyncio.timeout(AT_MOST_S):
                whole += await num_restored(tier, PROMPT) == NUM_BLOCKS
        except AntefixError:
            failed += 1
        del number
    return whole, failed


@pytest.mark.parametrize("kind", HARMS)
async def test_under_each_harm_no_byte_is_wrong_and_nothing_is_stuck(kind: str, server: str, url: str, at) -> None:
    await upload(url, PROMPT.blocks(), segment_bytes=1 << 20)
    harm = Harm(share=0.0, kinds=(kind,), seed=7)
    async with faulty_proxy(server, harm) as proxy:
        at(proxy)
        tier = tier_of(url)
        assert await num_restored(tier, PROMPT) == NUM_BLOCKS
        harm.share = 0.3
        whole, _ = await read_under_harm(tier, 12)
        assert harm.done[kind] >= 5
        # Repeating the request repairs most of the faults.
        assert whole >= 3
        harm.share = 0.0
        assert await num_restored(tier, PROMPT) == NUM_BLOCKS
        await tier.close()


async def test_under_all_harms_at_once_uploads_and_reads_end_right(server: str, url: str, at) -> None:
    harm = Harm(share=0.15, seed=11)
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with faulty_proxy(server, harm) as proxy:
        at(proxy)
        async with asyncio.timeout(AT_MOST_S):
            for _ in range(10):
                try:
                    await upload(url, PROMPT.blocks(), segment_bytes=1 << 20)
                    break
                except Unavailable:
                    continue
            tier = tier_of(url, refresh_s=0.0)
            await read_under_harm(tier, 40)
        harm.share = 0.0
        assert await num_restored(tier, PROMPT) == NUM_BLOCKS
        await tier.close()
    assert sum(harm.done.values()) > 25
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before
    assert grown_kib < 400 << 10


async def test_a_server_that_is_gone_is_a_miss_and_back_is_found(server: str, url: str, at, tmp_path: Path) -> None:
    await upload(url, PROMPT.blocks(), segment_bytes=1 << 20)
    at("http://127.0.0.1:9")
    gone = tier_of(url)
    async with asyncio.timeout(AT_MOST_S):
        with pytest.raises(AntefixError):
            await gone.held(PROMPT.hashes, fingerprint=FINGERPRINT)
    await gone.close()
    at(server)
    back = tier_of(url)
    assert await num_restored(back, PROMPT) == NUM_BLOCKS
    await back.close()
