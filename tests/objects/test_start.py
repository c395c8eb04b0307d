"""A service is ready when the object tier's index is loaded, so the first request finds its blocks. A bucket without
answers delays the start only briefly.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from antefix.errors import Unavailable
from antefix.objects.bucket import open_bucket
from antefix.objects.object_tier import ObjectTier
from antefix.store import many_stores, standing
from antefix.store.many_stores import ManyStores
from antefix.store.tier import Tier
from antefix.tier_kind import TierKind
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.objects.small_tier import upload, url_of
from tests.waiting import until

pytestmark = pytest.mark.asyncio
PROMPT = Prompt(list(range(BLOCK * 10)))


def stores_over(bucket) -> ManyStores:
    return ManyStores([], more=[Tier("file", TierKind.OBJECT, ObjectTier(bucket))])


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A bucket whose first listing takes longer than any call may."""
    monkeypatch.setattr(standing, "ASK_S", 0.02)
    monkeypatch.setattr(standing, "ASK_S_MAX", 0.02)
    bucket = open_bucket(url_of(tmp_path))
    list_objects = bucket.list_objects

    async def late(*args, **kwargs):
        await asyncio.sleep(bucket.late_s)
        return await list_objects(*args, **kwargs)

    bucket.late_s = 0.1
    bucket.list_objects = late
    return bucket


async def num_stored(stores: ManyStores) -> int:
    # A look-up in memory is in time even if this machine is busy.
    stores.tiers[0].standing.answered(60.0)
    return (await stores.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks


async def test_the_first_request_after_the_start_finds_what_the_tier_holds(slow, monkeypatch, tmp_path: Path) -> None:
    await upload(url_of(tmp_path), PROMPT.blocks())
    stores = stores_over(slow)
    await stores.start()
    monkeypatch.setattr(standing, "ASK_S_MAX", 60.0)
    slow.late_s = 3600.0
    assert await num_stored(stores) == 10
    await stores.close()


async def test_a_bucket_that_hangs_holds_no_start_up_and_counts_when_it_is_loaded(
    slow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await upload(url_of(tmp_path), PROMPT.blocks())
    monkeypatch.setattr(many_stores, "LOAD_S", 0.02)
    stores = stores_over(slow)
    await stores.start()
    assert "is not loaded yet" in caplog.text
    catalog = stores.tiers[0].source.catalog
    await until(lambda: catalog.loaded_ms)
    monkeypatch.setattr(standing, "ASK_S_MAX", 60.0)
    assert await num_stored(stores) == 10
    await stores.close()


async def test_a_bucket_that_fails_holds_no_start_up(slow, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*args, **kwargs):
        raise Unavailable("no route to it")

    slow.list_objects = broken
    stores = stores_over(slow)
    await stores.start()
    assert "is not loaded yet" in caplog.text
    with pytest.raises(Unavailable):
        await num_stored(stores)
    await stores.close()
