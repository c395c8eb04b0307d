"""Several routers learn workers' memory through one real Redis, lose Redis, and recover their knowledge."""

import asyncio

import pytest
from redis.asyncio import Redis, RedisCluster

from antefix.errors import ConfigError
from antefix.events import redis_stream
from antefix.events.address import check_url
from antefix.events.block_events import keys_of
from antefix.events.numbered_log import Cursor
from antefix.events.redis_stream import StreamPublisher, StreamReader, memory_stream
from antefix_router.placement.directory import Directory
from antefix_router.placement.memory_feed import MemoryFeed
from tests.events.sources import EVENT_KEYS
from tests.router.memory_worker import Worker, leading, names_of
from tests.waiting import until

CHAIN = names_of("a", 400)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(redis_stream, "_RETRY_S", 0.05)
    monkeypatch.setattr(redis_stream, "ALIVE_S", 0.2)
    monkeypatch.setattr("antefix.events.follower._RETRY_S", 0.05)


class Rack:
    """Workers that send events to one Redis, and routers that read them."""

    def __init__(self, url):
        self.url = url
        self.workers, self.publishers, self.routers = [], [], []

    async def worker(self, **options):
        worker = await Worker(**options).start()
        self.workers.append(worker)
        await self.publish(worker)
        for feed, _ in self.routers:
            feed.follow([each.address for each in self.workers])
        return worker

    async def publish(self, worker):
        publisher = StreamPublisher(
            self.url, worker.memory.log, memory_stream(worker.address), worker.address, keys=EVENT_KEYS
        )
        self.publishers.append(await publisher.__aenter__())

    async def router(self):
        directory = Directory()
        feed = MemoryFeed(directory, redis_url=self.url, keys=EVENT_KEYS)
        feed.start()
        feed.follow([worker.address for worker in self.workers])
        self.routers.append((feed, directory))
        return feed, directory

    def is_known(self):
        """Whether every router knows exactly what every worker holds."""
        return all(
            feed.in_step(worker.address)
            and leading(directory, worker.address, CHAIN) == worker.memory.num_leading(CHAIN)
            for feed, directory in self.routers
            for worker in self.workers
        )

    def has_places(self):
        """Whether every router reads all workers' streams. An event sent before that is a gap for it, which costs one
        more snapshot.
        """
        return all(
            memory_stream(worker.address) in feed._reader._last for feed, _ in self.routers for worker in self.workers
        )

    async def close(self):
        for publisher in self.publishers:
            await publisher.__aexit__(None, None, None)
        for feed, _ in self.routers:
            await feed.close()
        for worker in self.workers:
            await worker.stop()


@pytest.fixture
async def rack_at():
    racks = []

    def make(url):
        racks.append(Rack(url))
        return racks[-1]

    yield make
    for rack in racks:
        await rack.close()


async def snapshots_settled(rack):
    await until(lambda: rack.is_known() and rack.has_places())
    return [feed.counters.num_snapshots for feed, _ in rack.routers]


async def test_all_routers_know_what_all_workers_hold_and_late_ones_too(start_redis, rack_at):
    rack = rack_at(start_redis().url)
    first, second = await rack.worker(), await rack.worker()
    first.memory.store(CHAIN[:30])
    await rack.router()
    await rack.router()
    await until(rack.is_known)
    second.memory.store(CHAIN[:50])
    first.memory.evict(reversed(CHAIN[20:30]))
    await until(rack.is_known)
    (await rack.worker()).memory.store(CHAIN[:7])
    await rack.router()
    await until(rack.is_known)
    assert [leading(directory, second.address, CHAIN) for _, directory in rack.routers] == [50, 50, 50]


async def test_changes_travel_through_redis_and_not_by_snapshots(start_redis, rack_at):
    rack = rack_at(start_redis().url)
    worker = await rack.worker()
    feed, _ = await rack.router()
    settled = await snapshots_settled(rack)
    for count in range(10, 400, 10):
        worker.memory.store(CHAIN[:count])
        await asyncio.sleep(0.005)
    await until(rack.is_known)
    assert [feed.counters.num_snapshots for feed, _ in rack.routers] == settled
    assert feed.counters.num_events > 1


async def test_changes_before_a_router_reads_the_stream_cost_one_more_snapshot(start_redis, rack_at, monkeypatch):
    may_read, find_place = asyncio.Event(), StreamReader._find_place

    async def late(reader, stream):
        await may_read.wait()
        await find_place(reader, stream)

    monkeypatch.setattr(StreamReader, "_find_place", late)
    rack = rack_at(start_redis().url)
    worker = await rack.worker()
    feed, _ = await rack.router()
    await until(rack.is_known)
    worker.memory.store(CHAIN[:30])
    await until(lambda: rack.publishers[0]._told == worker.memory.log.cursor)
    may_read.set()
    await until(rack.is_known)
    assert (feed.counters.num_gaps, feed.counters.num_snapshots) == (1, 2)


async def test_redis_killed_in_mid_run_degrades_to_what_is_known_and_heals(start_redis, rack_at):
    server = start_redis()
    rack = rack_at(server.url)
    worker = await rack.worker()
    worker.memory.store(CHAIN[:30])
    _, directory = await rack.router()
    settled = await snapshots_settled(rack)
    server.kill()
    worker.memory.store(CHAIN[:60])
    await asyncio.sleep(0.3)
    # The router keeps its knowledge, and its own placements count again.
    assert leading(directory, worker.address, CHAIN) == 30
    directory.guess(worker.address, keys_of(CHAIN[:45]))
    assert leading(directory, worker.address, CHAIN) == 45
    # Redis comes back empty, as after a crash without persistence. The worker's ring still has the unsent events.
    server.start()
    await until(rack.is_known)
    # An event sent before the router has its place in the new Redis is a gap, which costs only one more snapshot.
    (after,) = [feed.counters.num_snapshots for feed, _ in rack.routers]
    assert after - settled[0] in (0, 1)
    assert leading(directory, worker.address, CHAIN) == 60
    directory.guess(worker.address, keys_of(CHAIN))
    assert leading(directory, worker.address, CHAIN) == 60


async def test_events_that_redis_took_and_lost_are_noticed_and_made_good_by_a_snapshot(start_redis, rack_at):
    server = start_redis()
    rack = rack_at(server.url)
    worker = await rack.worker()
    worker.memory.store(CHAIN[:30])
    feed, _ = await rack.router()
    (before,) = await snapshots_settled(rack)
    # The router is cut off while the worker sends events, and the events are deleted before the router is back.
    client = Redis.from_url(server.url)
    take, feed._reader._take = feed._reader._take, lambda address, batch: None
    worker.memory.store(CHAIN[:60])
    await until(lambda: rack.publishers[0]._told == worker.memory.log.cursor)
    await asyncio.sleep(0.3)
    await client.flushall()
    await client.aclose()
    feed._reader._take = take
    await until(rack.is_known)
    assert feed.counters.num_snapshots == before + 1


async def test_a_worker_whose_ring_overflowed_while_redis_was_away_is_asked_for_a_snapshot(start_redis, rack_at):
    server = start_redis()
    rack = rack_at(server.url)
    worker = await rack.worker(num_blocks_max=8)
    await rack.router()
    (before,) = await snapshots_settled(rack)
    server.kill()
    for name in CHAIN[:100]:
        worker.memory.store([name])
        worker.memory.log.since(Cursor())
    server.start()
    await until(rack.is_known)
    assert rack.routers[0][0].counters.num_snapshots > before


async def test_a_restarted_worker_is_another_epoch_and_its_old_memory_is_forgotten(start_redis, rack_at):
    rack = rack_at(start_redis().url)
    worker = await rack.worker()
    worker.memory.store(CHAIN[:30])
    _, directory = await rack.router()
    await until(rack.is_known)
    await rack.publishers.pop().__aexit__(None, None, None)
    await worker.restart()
    worker.memory.store(CHAIN[:4])
    await rack.publish(worker)
    await until(rack.is_known)
    assert leading(directory, worker.address, CHAIN) == 4


async def test_streams_are_bounded_and_a_router_that_fell_behind_the_trimming_recovers(
    start_redis, rack_at, monkeypatch
):
    monkeypatch.setattr(redis_stream, "STREAM_LENGTH_MAX", 10)
    server = start_redis("--stream-node-max-entries", "5")
    rack = rack_at(server.url)
    worker = await rack.worker()
    feed, _ = await rack.router()
    await until(rack.is_known)
    for task in feed._reader._tasks:
        task.cancel()
    for count in range(1, 100):
        worker.memory.store(CHAIN[:count])
        worker.memory.log.since(Cursor())
    await until(lambda: rack.publishers[0]._told == worker.memory.log.cursor)
    client = Redis.from_url(server.url)
    assert await client.xlen(memory_stream(worker.address)) < 25
    await client.aclose()
    feed._reader.start()
    await until(rack.is_known)
    assert feed.counters.num_gaps == 1


async def test_keys_are_fit_for_a_cluster(start_cluster, rack_at):
    rack = rack_at(start_cluster().url)
    worker = await rack.worker()
    worker.memory.store(CHAIN[:30])
    await rack.router()
    await until(rack.is_known)
    worker.memory.store(CHAIN[:60])
    await until(rack.is_known)
    assert isinstance(rack.routers[0][0]._reader._redis, RedisCluster)


async def test_what_others_write_there_stops_nobody(start_redis, rack_at):
    server = start_redis()
    rack = rack_at(server.url)
    worker = await rack.worker()
    await rack.router()
    await until(rack.is_known)
    client = Redis.from_url(server.url)
    stream = memory_stream(worker.address)
    good = {"a": worker.address, "e": worker.memory.log.cursor.epoch, "n": 1, "k": 1, "b": b"12345678"}
    for entry in ({"x": "y"}, {**good, "n": "one"}, {**good, "k": 9}, {**good, "b": b"short"}, {**good, "a": "nobody"}):
        await client.xadd(stream, entry)
    assert await client.xlen(stream) >= 5
    await client.aclose()
    worker.memory.store(CHAIN[:30])
    await until(rack.is_known)


@pytest.mark.parametrize("url", ["http://127.0.0.1", "127.0.0.1:6379", "redis"])
def test_an_address_that_is_not_of_redis_is_refused(url):
    with pytest.raises(ConfigError, match="redis"):
        check_url(url)
