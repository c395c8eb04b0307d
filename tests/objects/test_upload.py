"""A store uploads records by policy, once, at a bounded rate, and a host without its disk gets them back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

from antefix.errors import ConfigError, Unavailable
from antefix.record import RecordKind
from antefix.store.many_stores import ManyStores
from antefix.store.store_members import Member
from antefix.store.tier import Tier
from antefix.tier_kind import TierKind
from antefix_kvstore.embedded_store import EmbeddedStore
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.object_upload import ObjectUploader
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt, owner
from tests.objects.small_tier import OWNER, num_restored, tier_of, url_of
from tests.waiting import until

pytestmark = pytest.mark.asyncio
PROMPT = Prompt(list(range(BLOCK * 40)))
FORK = Prompt([*range(BLOCK * 30), *range(900, 900 + BLOCK * 4)])


@contextmanager
def uploading(directory: Path, **settings: object) -> Iterator[tuple[StorageEngine, ObjectUploader]]:
    defaults: dict[str, object] = {
        "dir": str(directory / "disk"),
        "budget_bytes": 8 << 20,
        "scrub_bytes_per_s": 0,
        "durable": False,
        "object_store": url_of(directory / "bucket"),
        "object_reused_after_s": 0.0,
        "object_segment_bytes": 4096,
    }
    engine = StorageEngine(KvStoreConfig(**{**defaults, **settings}))  # type: ignore[arg-type]
    engine.register(FINGERPRINT, BLOCK, {})
    try:
        yield engine, ObjectUploader(engine)
    finally:
        engine.close()


async def num_in_tier(directory: Path, prompt: Prompt = PROMPT) -> int:
    tier = tier_of(url_of(directory / "bucket"))
    try:
        return await num_restored(tier, prompt)
    finally:
        await tier.close()


async def test_what_is_read_again_goes_up_with_its_whole_prefix_and_once(tmp_path: Path) -> None:
    with uploading(tmp_path) as (engine, uploader):
        engine.put([*PROMPT.blocks(), *FORK.blocks(), PROMPT.checkpoint(19)])
        await uploader.step(flush=True)
        assert uploader.counters.num_uploaded == 0
        engine.note_use([(RecordKind.BLOCK, PROMPT.hashes[19]), (RecordKind.CHECKPOINT, PROMPT.hashes[19])], ())
        await uploader.step(flush=True)
        assert uploader.counters.num_uploaded == 21
        engine.note_use([(RecordKind.BLOCK, FORK.hashes[-1])], ())
        await uploader.step(flush=True)
        assert uploader.counters.num_uploaded == 21 + 14
        engine.note_use([(RecordKind.BLOCK, FORK.hashes[-1])], ())
        await uploader.step(flush=True)
        assert uploader.counters.num_uploaded == 21 + 14
    assert await num_in_tier(tmp_path, FORK) == 34
    assert await num_in_tier(tmp_path) == 30


async def test_a_read_right_after_the_write_is_no_reuse(tmp_path: Path) -> None:
    with uploading(tmp_path, object_reused_after_s=600.0) as (engine, uploader):
        engine.put(PROMPT.blocks())
        engine.note_use([(RecordKind.BLOCK, PROMPT.hashes[-1])], ())
        await uploader.step(flush=True)
        assert uploader.counters.num_uploaded == 0


async def test_a_service_uploads_and_stops_by_itself(tmp_path: Path) -> None:
    with uploading(tmp_path, object_upload=("all",), object_wait_s=0.0) as (engine, _):
        uploader = ObjectUploader(engine, step_s=0.01)
        uploader.start()
        engine.put(PROMPT.blocks())
        await until(lambda: uploader.counters.num_uploaded >= 40)
        uploader.stop()
        assert uploader.counters.num_failures == 0
    assert await num_in_tier(tmp_path) == 40


async def test_an_index_that_cannot_be_read_at_the_start_does_not_end_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with uploading(tmp_path, object_upload=("all",), object_wait_s=0.0) as (engine, _):
        uploader = ObjectUploader(engine, step_s=0.01)
        recalled: list[int] = []

        def recall() -> None:
            recalled.append(len(recalled))
            if len(recalled) == 1:
                raise lmdb.CorruptedError("a page is damaged")

        monkeypatch.setattr(uploader, "recall", recall)
        uploader.start()
        engine.put(PROMPT.blocks(5))
        await until(lambda: uploader.counters.num_uploaded >= 5)
        uploader.stop()
        assert recalled == [0, 1] and uploader.counters.num_failures == 1


async def test_what_is_pinned_goes_up_also_after_a_restart(tmp_path: Path) -> None:
    with uploading(tmp_path) as (engine, uploader):
        engine.put(PROMPT.blocks())
        engine.pin([(RecordKind.BLOCK, PROMPT.hashes[-1])], 600.0)
        assert uploader.num_waiting == 1
    with uploading(tmp_path) as (engine, uploader):
        uploader.recall()
        assert uploader.num_waiting == 1
        await uploader.step(flush=True)
    assert await num_in_tier(tmp_path) == 40


async def test_what_eviction_takes_next_goes_up_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with uploading(tmp_path, budget_bytes=1 << 20, object_upload=("evicting",)) as (engine, uploader):
        monkeypatch.setattr("antefix_kvstore.object_upload.EVICTING_S", 0.0)
        old = Prompt(list(range(BLOCK * 8)), payload_bytes=20_000)
        engine.put(old.blocks())
        for number in range(8):
            await uploader.step(flush=True)
            engine.put(Prompt(list(range(1000 * number, 1000 * number + BLOCK * 8)), payload_bytes=20_000).blocks())
        assert engine.lookup(old.hashes, fingerprint=FINGERPRINT).num_blocks < 8
        assert 0 < uploader.counters.num_uploaded < 8 * 8
    assert await num_in_tier(tmp_path, old) == 8


async def test_all_means_all(tmp_path: Path) -> None:
    with uploading(tmp_path, object_upload=("all",)) as (engine, uploader):
        engine.put(PROMPT.blocks(25))
        await uploader.step(flush=True)
    assert await num_in_tier(tmp_path) == 25


async def test_what_waits_is_gathered_into_segments(tmp_path: Path) -> None:
    with uploading(tmp_path, object_upload=("all",), object_segment_bytes=1 << 20) as (engine, uploader):
        engine.put(PROMPT.blocks(5))
        await uploader.step()
        assert (uploader.counters.num_uploaded, uploader.num_waiting) == (0, 5)
        engine.put(PROMPT.blocks(25)[5:])
        await uploader.step(flush=True)
        assert (uploader.counters.num_uploaded, uploader.writer.counters.num_segments) == (25, 1)


async def test_tenants_lie_in_segments_of_their_own(tmp_path: Path) -> None:
    with uploading(tmp_path, object_upload=("all",), object_segment_bytes=1 << 20) as (engine, uploader):
        engine.put([PROMPT.block(number, tenant=owner("me")) for number in range(5)])
        engine.put([Prompt(list(range(500, 500 + BLOCK))).block(0, tenant=owner("you"))])
        await uploader.step(flush=True)
        assert {ref.tenant for ref in uploader.catalog.segments()} == {owner("me")[:16], owner("you")[:16]}


async def test_an_upload_that_fails_is_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with uploading(tmp_path, object_upload=("all",)) as (engine, uploader):
        engine.put(PROMPT.blocks(30))
        put = uploader.catalog.bucket.put
        num_puts = 0

        async def fail(name: str, parts: object) -> None:
            nonlocal num_puts
            num_puts += 1
            if num_puts == 2:
                raise Unavailable("slow down")
            await put(name, parts)  # type: ignore[arg-type]

        monkeypatch.setattr(uploader.catalog.bucket, "put", fail)
        with pytest.raises(Unavailable):
            await uploader.step(flush=True)
        assert uploader.num_waiting == 30
        await uploader.step(flush=True)
    assert await num_in_tier(tmp_path) == 30


async def test_uploads_keep_to_their_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with uploading(tmp_path, object_upload=("all",), object_upload_bytes_per_s=1 << 14) as (engine, uploader):
        engine.put(PROMPT.blocks())
        waits: list[float] = []

        async def wait(seconds: float) -> bool:
            waits.append(seconds)
            return False

        monkeypatch.setattr(uploader, "_stopped_within", wait)
        await uploader.step(flush=True)
        sent = sum(ref.nbytes for ref in uploader.catalog.segments())
        assert max(waits) > 0.8 * sent / (1 << 14)


async def test_a_copy_near_its_end_is_made_again_by_reuse(tmp_path: Path) -> None:
    with uploading(tmp_path, object_block_ttl_s=1000.0) as (engine, uploader):
        clock = Clock()
        clock.ms = engine.clock_ms()
        engine.clock_ms = uploader.catalog.clock_ms = clock  # type: ignore[misc]
        engine.put(PROMPT.blocks(10))
        for after_s, num_uploaded in ((1.0, 10), (700.0, 10), (100.0, 20)):
            clock.advance(after_s)
            engine.note_use([(RecordKind.BLOCK, PROMPT.hashes[9])], ())
            await uploader.step(flush=True)
            assert uploader.counters.num_uploaded == num_uploaded


async def test_hits_come_back_when_the_disk_is_wiped_while_it_is_used(tmp_path: Path) -> None:
    with uploading(tmp_path) as (engine, uploader):
        engine.put([*PROMPT.blocks(), PROMPT.checkpoint(19)])
        engine.note_use([(RecordKind.BLOCK, PROMPT.hashes[-1]), (RecordKind.CHECKPOINT, PROMPT.hashes[19])], ())
        await uploader.step(flush=True)
    tier = tier_of(url_of(tmp_path / "bucket"))
    store = EmbeddedStore(KvStoreConfig(dir=str(tmp_path / "disk"), budget_bytes=8 << 20, scrub_bytes_per_s=0))
    near = Member(tier=Tier("a", TierKind.DISK, store), store=store, near=True)
    many = ManyStores([near], more=[Tier("file", TierKind.OBJECT, tier)])
    found = await many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    assert (found.num_blocks, found.tiers) == (40, ((40, "disk:a"),))
    for path in (tmp_path / "disk" / "segments", tmp_path / "disk" / "index"):
        shutil.rmtree(path)
    store.engine.note_damage("its files are gone")
    store.engine.maintain()
    into = PROMPT.buffers()
    read = await many.read_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT, tenant=OWNER)
    assert [bytes(each) for each in into] == [PROMPT.payload(number) for number in range(40)]
    assert [(each.tier, each.num_blocks) for each in read.reads] == [("object:file", 40)]
    payload = await many.get(RecordKind.CHECKPOINT, PROMPT.hashes[19], fingerprint=FINGERPRINT, tenant=OWNER)
    assert payload == PROMPT.payload(19, RecordKind.CHECKPOINT)
    await many.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"object_store": "http://bucket"}, "an object store is"),
        ({"object_store": "file://relative/path"}, "three slashes"),
        ({"object_store": "s3:///prefix"}, "names no bucket"),
        ({"object_store": "s3://key:secret@bucket/x"}, "credentials as environment variables"),
        ({"object_upload": ("some",)}, "object_upload takes"),
        ({"object_quotas": ("acme",)}, "tenant=size"),
        ({"object_block_ttl_s": -1.0}, "must not be negative"),
        ({"object_segment_bytes": 1}, "object_segment_bytes"),
        ({"object_upload_bytes_per_s": 0}, "at least 1 KiB"),
    ],
)
async def test_malformed_settings_are_refused_by_name(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        KvStoreConfig(**{"object_store": "file:///tmp/none", **settings})  # type: ignore[arg-type]
