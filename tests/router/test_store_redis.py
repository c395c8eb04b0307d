"""Several routers follow one store through one real Redis, lose Redis, recover, and never claim more than it holds."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from redis.asyncio import Redis, RedisCluster

from antefix.errors import ConfigError
from antefix.events import redis_stream
from antefix.events.block_events import keys_of
from antefix.events.redis_stream import StreamPublisher, store_stream
from antefix.record import RecordKind
from antefix.store.remote_store import RemoteStore
from antefix.store.store_feed import StoreFeed
from antefix_kvstore.kvstore_config import KvStoreConfig
from tests.events.sources import EVENT_KEYS
from tests.kvstore.small_store import FINGERPRINT, owner
from tests.redis_servers import free_port
from tests.router.test_feed_of_a_store import PROMPTS, serve
from tests.waiting import until


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(redis_stream, "_RETRY_S", 0.05)
    monkeypatch.setattr(redis_stream, "ALIVE_S", 0.2)
    monkeypatch.setattr("antefix.events.follower._RETRY_S", 0.05)


class Rack:
    """One store that sends events to one Redis, and routers that read them."""

    def __init__(self, url, directory):
        self.url, self.directory = url, directory
        self.name, self.feeds, self.publisher = "", [], None

    async def open(self):
        self.servicer, self.server = await serve(self.directory, self.name or "127.0.0.1:0")
        self.name = self.server.address
        self.store = RemoteStore(self.name)
        await self.publish()
        return self

    async def publish(self):
        publisher = StreamPublisher(
            self.url, self.servicer.engine.events, store_stream(self.name), self.name, keys=EVENT_KEYS
        )
        self.publisher = await publisher.__aenter__()

    async def hush(self):
        if self.publisher is not None:
            await self.publisher.__aexit__(None, None, None)
            self.publisher = None

    async def router(self):
        feed = StoreFeed(self.store.watch, fingerprint=FINGERPRINT, redis_url=self.url, name=self.name, keys=EVENT_KEYS)
        feed.start()
        self.feeds.append(feed)
        return feed

    async def put(self, number):
        await self.store.put(PROMPTS[number].blocks())

    async def evict(self, number, block):
        await self.store.evict([(RecordKind.BLOCK, PROMPTS[number].hashes[block])], owner=owner(""))

    async def known(self):
        """Every router's answer for every prompt, once it agrees with a look-up."""
        looked = [(await self.store.lookup(p.hashes, fingerprint=FINGERPRINT)).num_blocks for p in PROMPTS]
        await until(lambda: all(said(feed) == looked for feed in self.feeds))
        return looked

    async def shut(self):
        await self.hush()
        await self.store.close()
        await self.server.drain(0.2)
        await self.servicer.close()

    async def close(self):
        for feed in self.feeds:
            await feed.close()
        await self.shut()


def said(feed):
    return [feed.num_leading(keys_of(p.hashes)) for p in PROMPTS]


@pytest.fixture
async def rack_at(tmp_path):
    racks = []

    async def make(url):
        racks.append(await Rack(url, tmp_path / "store").open())
        return racks[-1]

    yield make
    for rack in racks:
        await rack.close()


async def test_all_routers_follow_the_store_through_redis_and_not_by_snapshots(start_redis, rack_at):
    rack = await rack_at(start_redis().url)
    await rack.put(0)
    await rack.router()
    await rack.router()
    assert await rack.known() == [5, 0, 0, 0]
    await rack.put(1)
    await rack.evict(0, 3)
    assert await rack.known() == [3, 5, 0, 0]
    assert [feed.counters.num_snapshots for feed in rack.feeds] == [1, 1]
    await rack.router()
    assert await rack.known() == [3, 5, 0, 0]


async def test_redis_killed_in_mid_run_leaves_the_store_to_be_asked_and_heals(start_redis, rack_at):
    server = start_redis()
    rack = await rack_at(server.url)
    feed, _ = await rack.router(), await rack.router()
    await rack.put(0)
    await rack.known()
    server.kill()
    await until(lambda: not any(feed.in_step for feed in rack.feeds))
    assert said(feed) == [None] * 4
    await rack.put(1)
    await rack.evict(0, 2)
    # Redis comes back empty, as after a crash without persistence. The store's ring still has the unsent events.
    server.start()
    assert await rack.known() == [2, 5, 0, 0]
    # An event sent before a router has its place in the new Redis is a gap, which costs only one more snapshot.
    assert {feed.counters.num_snapshots for feed in rack.feeds} <= {1, 2}


async def test_events_that_redis_took_and_lost_are_noticed_and_made_good_by_a_snapshot(start_redis, rack_at):
    server = start_redis()
    rack = await rack_at(server.url)
    feed = await rack.router()
    await rack.put(0)
    await rack.known()
    # The router is cut off while the store sends events, and the events are deleted before the router is back.
    take, feed._reader._take = feed._reader._take, lambda name, batch: None
    await rack.put(1)
    await until(lambda: rack.publisher._told == rack.servicer.engine.events.cursor)
    await asyncio.sleep(0.3)
    client = Redis.from_url(server.url)
    await client.flushall()
    await client.aclose()
    feed._reader._take = take
    # No new event is needed, because the store's sign of life has the missing number.
    assert await rack.known() == [5, 5, 0, 0]
    assert (feed.counters.num_gaps, feed.counters.num_snapshots) == (1, 2)


async def test_a_store_that_was_opened_again_is_another_epoch_and_its_old_words_count_no_more(start_redis, rack_at):
    server = start_redis()
    rack = await rack_at(server.url)
    feed = await rack.router()
    await rack.put(0)
    await rack.known()
    old = feed._cursor
    await rack.shut()
    await rack.open()
    await rack.put(2)
    assert await rack.known() == [5, 0, 5, 0]
    assert feed.counters.num_snapshots == 2
    client = Redis.from_url(server.url)
    entry = {
        "a": rack.name,
        "e": old.epoch,
        "n": old.number + 1,
        "k": 2,
        "f": FINGERPRINT,
        "b": PROMPTS[0].hashes[0][:8],
    }
    await client.xadd(store_stream(rack.name), entry)
    await client.aclose()
    await rack.put(3)
    assert await rack.known() == [5, 0, 5, 5]
    assert feed.counters.num_snapshots == 2


async def test_a_store_that_redis_hears_nothing_of_is_asked(start_redis, rack_at, monkeypatch):
    monkeypatch.setattr("antefix.events.follower._SILENT_S", 0.5)
    rack = await rack_at(start_redis().url)
    feed = await rack.router()
    await rack.put(0)
    await rack.known()
    await rack.hush()
    await until(lambda: not feed.in_step)
    await rack.put(1)
    assert said(feed) == [None] * 4
    await rack.publish()
    assert await rack.known() == [5, 5, 0, 0]


async def test_what_others_write_there_stops_nobody(start_redis, rack_at):
    server = start_redis()
    rack = await rack_at(server.url)
    feed = await rack.router()
    await rack.known()
    client = Redis.from_url(server.url)
    good = {"a": rack.name, "e": feed._cursor.epoch, "n": 1, "k": 1, "f": FINGERPRINT, "b": b"12345678"}
    nameless = {key: value for key, value in good.items() if key != "a"}
    for entry in ({"x": "y"}, nameless, {**good, "n": "one"}, {**good, "k": 9}, {**good, "b": b"short"}):
        await client.xadd(store_stream(rack.name), entry)
    await client.aclose()
    await rack.put(0)
    assert await rack.known() == [5, 0, 0, 0]
    assert feed.counters.num_snapshots == 1


async def test_keys_are_fit_for_a_cluster(start_cluster, rack_at):
    rack = await rack_at(start_cluster().url)
    feed = await rack.router()
    await rack.put(0)
    assert await rack.known() == [5, 0, 0, 0]
    assert isinstance(feed._reader._redis, RedisCluster)


async def test_a_store_process_killed_and_started_again_is_followed_through_redis(start_redis, tmp_path):
    url, address = start_redis().url, f"127.0.0.1:{free_port()}"
    (tmp_path / "events.key").write_text(EVENT_KEYS.lines())
    flags = ["--dir", str(tmp_path / "store"), "--address", address, "--events-redis", url, "--budget-bytes", "256M"]
    flags += ["--events-key-file", str(tmp_path / "events.key")]

    def start():
        return subprocess.Popen(
            [sys.executable, "-m", "antefix_console", "serve", "kvstore", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        )

    process, store = start(), RemoteStore(address)
    feed = StoreFeed(store.watch, fingerprint=FINGERPRINT, redis_url=url, name=address, keys=EVENT_KEYS)
    try:
        feed.start()
        await until(lambda: feed.in_step)
        await store.put(PROMPTS[0].blocks())
        await until(lambda: said(feed) == [5, 0, 0, 0])
        assert feed.counters.num_snapshots == 1
        process.kill()
        process.wait()
        process = start()
        await until(lambda: feed.counters.num_snapshots == 2 and feed.in_step)
        await store.put(PROMPTS[1].blocks())
        await until(lambda: said(feed) == [5, 5, 0, 0])
    finally:
        await feed.close()
        await store.close()
        process.kill()
        process.wait()


def test_a_store_refuses_an_address_that_is_not_of_redis(tmp_path):
    with pytest.raises(ConfigError, match="redis"):
        KvStoreConfig(dir=str(tmp_path), events_redis="http://127.0.0.1")


def test_a_store_refuses_to_tell_redis_what_nobody_would_believe(tmp_path):
    with pytest.raises(ConfigError, match="events-key-file"):
        KvStoreConfig(dir=str(tmp_path), events_redis="redis://127.0.0.1")
