"""The page cache is a separate tier. Samples show its contents, and its reads are counted apart from the disk's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from antefix.errors import InternalError
from antefix.located import Located, ReadSpeed, speed_of
from antefix.record import Held
from antefix.store.held_wire import held_from_wire, held_to_wire
from antefix.store.many_stores import ManyStores
from antefix.store.tier import TierSpeed
from antefix.store_files import page_cache
from antefix.store_files.page_cache import PageCache
from antefix.tier_kind import TierKind
from antefix.v1 import kvstore_pb2
from antefix_kvstore.metrics import store_metrics
from antefix_prefill.worker.read_speeds import read_speeds
from antefix_router.placement.loading import loading_tokens
from antefix_router.placement.work import Work
from tests.kvstore.small_store import BLOCK, FINGERPRINT
from tests.store.many_embedded import OWNER, PROMPT, rack_of

CHAIN = [bytes([number]) * 32 for number in range(10)]


@pytest.fixture
def first_half_cached(monkeypatch):
    """The page cache holds the records of the first 20 blocks and no others."""

    def resident(self, entries):
        return {(entry.segment, entry.offset): entry.position <= 20 * BLOCK for entry in entries}

    monkeypatch.setattr(PageCache, "_resident", resident)
    monkeypatch.setattr(page_cache, "NUM_SAMPLES", 40)


def with_page_cache(rack):
    """A rack whose first store is read from its files, so its page cache is a tier."""
    rack.members[0].page_cache = rack.members[0].tier.in_page_cache()
    rack.many = ManyStores(rack.members)
    return rack


def drop_from_page_cache(directory):
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def move_away(directory):
    directory.rename(directory.with_name("gone"))


async def test_samples_say_which_blocks_and_checkpoints_are_cached(tmp_path, first_half_cached):
    async with rack_of(tmp_path, "a") as rack:
        await rack.fill("a", 0, 40, checkpoints=[9, 35])
        engine = rack.stores["a"].engine
        held = engine.held(PROMPT.hashes, fingerprint=FINGERPRINT)
        assert held.spans == ((0, 40),) and held.checkpoints == (10, 36)
        assert held.cached == ((0, 20),) and held.cached_checkpoints == (10,)
        assert engine.reader.held(PROMPT.hashes[:8], fingerprint=FINGERPRINT).cached == ((0, 8),)
        assert held.parted() == (Held(spans=((20, 40),), checkpoints=(36,)), Held(spans=((0, 20),), checkpoints=(10,)))
        cache = engine.reader.page_cache
        assert (cache.num_sampled, cache.num_cached) == (48, 28)


async def test_a_long_prompt_costs_no_more_samples(tmp_path, first_half_cached, monkeypatch):
    monkeypatch.setattr(page_cache, "NUM_SAMPLES", 4)
    async with rack_of(tmp_path, "a") as rack:
        await rack.fill("a", 0, 40)
        engine = rack.stores["a"].engine
        assert engine.held(PROMPT.hashes, fingerprint=FINGERPRINT).cached == ((0, 20),)
        assert engine.reader.page_cache.num_sampled == 4


@pytest.mark.parametrize("num_spans", [0, 1, 15, 16, 17, 40, 4000])
def test_blocks_in_many_spans_cost_no_more_samples(num_spans):
    """A store may hold every second block of a long chain."""
    spans = tuple((start, start + 1) for start in range(0, 2 * num_spans, 2))
    sampled = page_cache._stretches(Held(spans=spans))
    assert set(sampled) <= set(spans) and len(sampled) <= 2 * page_cache.NUM_SAMPLES
    assert len(sampled) == num_spans or num_spans > page_cache.NUM_SAMPLES


async def test_the_kernel_is_asked_and_nothing_is_loaded(tmp_path, monkeypatch):
    """Uses a real disk, because a file in memory is always in the page cache."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        async with rack_of(Path(directory), "a") as rack:
            await rack.fill("a", 0, 20)
            store = rack.stores["a"].engine
            assert store.held(PROMPT.hashes, fingerprint=FINGERPRINT).num_cached == 20
            drop_from_page_cache(Path(directory, "a", "segments"))
            cached = store.held(PROMPT.hashes, fingerprint=FINGERPRINT).cached
            if cached:
                pytest.skip("this file system keeps its files in memory")
            assert store.held(PROMPT.hashes, fingerprint=FINGERPRINT).cached == ()
            assert await rack.num_restored() == 20
            assert store.held(PROMPT.hashes, fingerprint=FINGERPRINT).num_cached == 20


async def test_files_that_others_own_are_not_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(page_cache, "_may_know", lambda fd: False)
    async with rack_of(tmp_path, "ab") as rack:
        await rack.fill("a", 0, 20)
        assert rack.stores["a"].engine.held(PROMPT.hashes, fingerprint=FINGERPRINT).cached is None
        found = await with_page_cache(rack).many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
        assert found.tiers == ((20, "disk:a"),)


async def test_a_segment_that_is_gone_is_not_cached(tmp_path):
    async with rack_of(tmp_path, "a") as rack:
        await rack.fill("a", 0, 20)
        engine = rack.stores["a"].engine
        held = engine.held(PROMPT.hashes, fingerprint=FINGERPRINT)
        engine.reader.runs.files.close()
        move_away(tmp_path / "a" / "segments")
        assert engine.reader.page_cache.sampled(held, PROMPT.hashes).cached == ()


async def test_look_ups_and_restores_name_the_page_cache(tmp_path, first_half_cached):
    async with rack_of(tmp_path, "ab") as rack:
        await rack.fill("a", 0, 30, checkpoints=[9, 29])
        await rack.fill("b", 30, 40)
        many = with_page_cache(rack).many
        found = await many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
        assert found.num_blocks == 40
        assert found.tiers == ((20, "page_cache:a"), (30, "disk:a"), (40, "peer:b"))
        assert found.checkpoint_tiers == ("page_cache:a", "disk:a")
        into = PROMPT.buffers()
        read = await many.read_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT, tenant=OWNER)
        assert [bytes(each) for each in into] == [PROMPT.payload(index) for index in range(40)]
        assert {each.tier: each.num_blocks for each in read.reads} == {"page_cache:a": 20, "disk:a": 10, "peer:b": 10}
        # A store is asked once, whatever its number of tiers. None of its blocks count as another host's.
        assert rack.stores["a"].num_asked == 2
        assert [tier.label for tier in many.tiers] == ["disk:a", "peer:b", "page_cache:a"]
        assert await many.pin_prefix(PROMPT.hashes, fingerprint=FINGERPRINT, duration_s=60, owner=OWNER) == 40


async def test_a_store_that_dies_loses_both_its_tiers(tmp_path, first_half_cached):
    async with rack_of(tmp_path, "ab") as rack:
        await rack.fill("a", 0, 30)
        await rack.fill("b", 0, 40)
        with_page_cache(rack).stores["a"].dies_after = 3
        assert await rack.num_restored() == 40
        shunned = {tier.label for tier in rack.many.tiers if tier.is_shunned}
        assert shunned == {"disk:a", "page_cache:a"}


def test_speeds_are_learned_apart_and_a_router_is_told_both():
    clock = SimpleNamespace(s=0.0)
    speeds = {kind: TierSpeed(kind, lambda: clock.s) for kind in (TierKind.PAGE_CACHE, TierKind.DISK)}
    for _ in range(60):
        speeds[TierKind.PAGE_CACHE].observe(30_000_000, 0.01)
        speeds[TierKind.DISK].observe(10_000_000, 0.1)
    predicted = [speed.predicted_s(10_000_000) for speed in speeds.values()]
    assert predicted == [pytest.approx(0.01 / 3, rel=0.3), pytest.approx(0.1, rel=0.1)]
    assert speeds[TierKind.DISK].recent_bytes == 600_000_000
    clock.s = 60.0
    assert speeds[TierKind.DISK].recent_bytes == 300_000_000


async def test_a_worker_tells_the_speed_of_each_part_and_of_the_mix(tmp_path):
    async with rack_of(tmp_path, "ab") as rack:
        many = with_page_cache(rack).many
        engine = SimpleNamespace(store=many, layout=SimpleNamespace(block_bytes=1000 * BLOCK), block_size=BLOCK)
        told = read_speeds(engine, [])
        # Nothing was read yet, so all blocks count as on disk.
        assert set(told) == {"a", "page_cache:a", "disk:a"} and told["a"] == told["disk:a"]
        rack.members[0].page_cache.speed.observe(30_000_000, 0.01)
        rack.members[0].tier.speed.observe(10_000_000, 0.1)
        told = read_speeds(engine, ["b"])
        parts = [told[name].seconds_per_token for name in ("page_cache:a", "disk:a")]
        assert told["a"].seconds_per_token == pytest.approx(0.75 * parts[0] + 0.25 * parts[1], rel=1e-3)
        assert parts[0] < told["a"].seconds_per_token < parts[1] and "b" in told


def test_the_wire_keeps_what_is_cached():
    held = Held(spans=((0, 9),), checkpoints=(4, 9), cached=((0, 3), (5, 6)), cached_checkpoints=(4,))
    again = held_from_wire(held_to_wire(held))
    assert (again, again.cached, again.cached_checkpoints) == (held, held.cached, (4,))
    assert held_from_wire(held_to_wire(Held(spans=((0, 9),), cached=()))).cached == ()
    # A store that does not know its page cache, and a store of an earlier version.
    assert held_from_wire(held_to_wire(Held(spans=((0, 9),)))).cached is None
    with pytest.raises(InternalError, match="not in order"):
        held_from_wire(kvstore_pb2.LookupResponse(spans=[0, 9], knows_cached=True, cached=[3, 1]))


def test_a_router_places_by_what_is_in_a_hosts_page_cache():
    word = Located(chain=CHAIN, fingerprint=b"f", held={"a": Held(spans=((0, 8),), cached=((0, 5),))})
    assert word.parts(8) == [(5, frozenset({"page_cache:a"})), (3, frozenset({"disk:a"}))]
    assert word.of("a", CHAIN, b"f") == Held(spans=((0, 8),))
    fast, slow, far = (ReadSpeed(latency_s=0, seconds_per_token=each) for each in (1e-6, 1e-4, 1e-5))
    here, elsewhere = {"a": slow, "page_cache:a": fast, "disk:a": slow}, {"a": far}
    assert speed_of("page_cache:a", here) is fast and speed_of("disk:a", here) is slow
    assert speed_of("page_cache:a", elsewhere) is speed_of("disk:a", elsewhere) is far
    assert speed_of("10.0.0.1:7010", {"7010": far}) is None
    places = tuple((blocks * 100, stores) for blocks, stores in word.parts(8))
    work = Work(num_tokens=1000, stored_tokens=800, affinity=0, places=places)
    assert loading_tokens(work, 0, here, 1000) == pytest.approx(500 * 1e-3 + 300 * 0.1)
    assert loading_tokens(work, 0, elsewhere, 1000) == pytest.approx(800 * 1e-2)


async def test_what_is_written_later_leaves_the_rest_as_it_is_known():
    word = Located(chain=CHAIN, fingerprint=b"f", held={"a": Held(spans=((0, 4),), cached=((0, 4),))})
    assert word.with_span(["a"], 4, 8).parts(8) == [(4, frozenset({"page_cache:a"})), (4, frozenset({"disk:a"}))]


async def test_the_store_counts_its_samples(tmp_path, first_half_cached):
    async with rack_of(tmp_path, "a") as rack:
        await rack.fill("a", 0, 40)
        store = rack.stores["a"].store
        store.engine.held(PROMPT.hashes, fingerprint=FINGERPRINT)
        scrubber = SimpleNamespace(counters=SimpleNamespace(passes=0, records=0, bytes=0, corrupt=0))
        found = list(store_metrics(store.engine, scrubber, SimpleNamespace(queued_bytes=0)))
        samples = {
            sample.labels["cached"]: sample.value
            for metric in found
            if metric.name == "antefix_store_page_cache_samples"
            for sample in metric.samples
        }
        assert samples == {"yes": 20, "no": 20}
