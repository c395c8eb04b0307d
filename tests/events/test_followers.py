"""A follower of numbered events is in step with the source or knows that it is not. Both kinds of source are tested."""

import asyncio
import contextlib
import random
import time

import pytest
from redis.asyncio import Redis

from antefix.events import event_seal, numbered_log, redis_stream
from antefix.events import follower as follower_module
from antefix.events.block_events import BlockEvent, EventKind
from antefix.events.event_seal import DropReason, public_epoch
from antefix.events.numbered_log import Batch, Cursor, watch_log
from tests.events.sources import CHAIN, EVENT_KEYS, MemorySource, StoreSource, cut_off, is_level, is_right
from tests.waiting import AT_MOST_S, until


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(follower_module, "_RETRY_S", 0.02)
    monkeypatch.setattr(redis_stream, "_RETRY_S", 0.05)
    monkeypatch.setattr(redis_stream, "ALIVE_S", 0.2)


@pytest.fixture(params=[MemorySource, StoreSource], ids=["memory", "store"])
async def source(request, tmp_path):
    made = await request.param().start(tmp_path / "store")
    yield made
    await made.stop()


@pytest.fixture
async def started(source):
    """Starts routers that follow the source, and ends them."""
    routers = []

    def start(redis_url="", watch=None):
        routers.append(source.router(redis_url, watch))
        routers[-1].start()
        return routers[-1]

    yield start
    for router in routers:
        await router.close()


async def level(source, *routers):
    await until(lambda: all(is_level(source, router) for router in routers))


def counted(router):
    counters = router.follower.counters
    return counters.num_snapshots, counters.num_gaps


# Tests in which the test itself decides which events come, and in which order.


async def by_hand(source):
    """A router that is level with the source and follows no stream by itself."""
    router = source.router()
    if isinstance(source, MemorySource):
        router.feed._watch = lambda *_: _nothing()
        router.start()
    for piece in source.snapshot_now():
        assert router.follower.apply(piece)
    return router


async def _nothing():
    await asyncio.Event().wait()
    yield


async def test_whatever_is_lost_a_follower_in_step_is_right(source):
    rng, router = random.Random(11), await by_hand(source)
    follower, cursor, num_lost = router.follower, source.log.cursor, 0
    for _ in range(30):
        await source.hold(rng.randrange(10))
        if rng.random() < 0.4:
            # Lost events are noticed at the next event, or when the source sends its present number.
            cursor, num_lost = source.log.cursor, num_lost + 1
        batch = source.log.since(cursor)
        while batch is not None and follower.apply(batch) and batch.cursor != source.log.cursor:
            batch = source.log.since(batch.cursor)
        assert is_right(source, router)
        if not is_level(source, router):
            assert all(follower.apply(piece) for piece in source.snapshot_now())
        assert is_level(source, router)
        cursor = source.log.cursor
    assert num_lost > 5 and 0 < follower.counters.num_gaps <= num_lost
    await router.close()


@pytest.mark.parametrize("number, epoch", [(2, None), (0, None), (1, b"another epoch")])
async def test_a_gap_a_repeat_or_another_epoch_in_a_stream_is_noticed(source, number, epoch):
    router = await by_hand(source)
    known = source.log.cursor
    event = BlockEvent(kind=EventKind.STORED, hashes=CHAIN[0][:8])
    batch = Batch(cursor=Cursor(epoch=epoch or known.epoch, number=known.number + number), events=(event,))
    assert router.follower.in_step and not router.follower.apply(batch)
    assert not router.follower.in_step
    await router.close()


async def test_half_a_snapshot_is_not_in_step_and_a_new_one_begins_from_nothing(source, monkeypatch):
    monkeypatch.setattr("antefix.events.memory_log.SNAPSHOT_BLOCKS", 4)
    monkeypatch.setattr("antefix_kvstore.event_log.SNAPSHOT_BLOCKS", 4)
    await source.hold(10)
    router = await by_hand(source)
    await source.hold(2)
    await source.hold(9)
    pieces = list(source.snapshot_now())
    assert [(piece.snapshot_begins, piece.snapshot_ends) for piece in pieces] == [
        (True, False), (False, False), (False, True)
    ]  # fmt: skip
    assert router.follower.apply(pieces[0]) and router.follower.apply(pieces[1])
    assert not router.follower.in_step
    assert all(router.follower.apply(piece) for piece in pieces)
    assert is_level(source, router) and router.num_known() == 9
    await router.close()


async def test_a_kind_of_a_later_version_has_a_number_and_says_nothing(source):
    await source.hold(3)
    router = await by_hand(source)
    source.log.append([BlockEvent(kind=EventKind(99), hashes=CHAIN[0], hash_bytes=32)])
    source.note()
    assert router.follower.apply(source.log.since(router.follower._cursor))
    assert is_level(source, router)
    await router.close()


async def test_a_slow_reader_that_the_ring_has_gone_over_gets_a_snapshot_in_its_stream(source):
    source.log._num_blocks_max = 4
    router = source.router()
    if isinstance(source, MemorySource):
        router = await by_hand(source)
    async with contextlib.aclosing(watch_log(source.log, Cursor(), source.snapshot)) as batches:
        assert router.follower.apply(await anext(batches))
        num_snapshots = router.follower.counters.num_snapshots
        await source.hold(3)
        # The missing events are still in the source's ring, so no snapshot is needed.
        while not is_level(source, router):
            assert router.follower.apply(await anext(batches))
        assert router.follower.counters.num_snapshots == num_snapshots
        await source.hold(20)
        await source.hold(15)
        while not is_level(source, router):
            assert router.follower.apply(await anext(batches))
        assert router.follower.counters.num_snapshots == num_snapshots + 1
    await router.close()


async def test_one_message_never_carries_more_than_it_may(source, monkeypatch):
    monkeypatch.setattr(numbered_log, "BATCH_EVENTS_MAX", 3)
    start = source.log.cursor
    await source.hold(8)
    sizes, batch = [], source.log.since(start)
    while batch.events:
        sizes.append(len(batch.events))
        batch = source.log.since(batch.cursor)
    assert sizes == [3, 3, 2]
    monkeypatch.setattr(numbered_log, "BATCH_BLOCKS_MAX", 2)
    assert len(source.log.since(start).events) == 2


# Direct streams.


async def test_a_direct_stream_follows_changes_and_another_epoch(source, started):
    router = started()
    await source.hold(12)
    await source.hold(7)
    await level(source, router)
    assert counted(router) == (1, 0)
    await source.restart()
    await source.hold(9)
    await level(source, router)
    assert counted(router) == (2, 0)


async def test_a_stream_that_breaks_without_loss_is_in_step_again_at_once(source, started):
    """The router recovers without a new event, because the source sends its present number."""
    streams = []

    async def breaking(cursor):
        broken = asyncio.Event()
        streams.append(broken)
        async with contextlib.aclosing(source.watch(cursor)) as batches:
            async for batch in batches:
                yield batch
                if not streams[1:]:
                    await broken.wait()
                    return

    await source.hold(5)
    router = started(watch=breaking)
    await level(source, router)
    streams[0].set()
    await until(lambda: len(streams) > 1)
    await level(source, router)
    assert counted(router) == (1, 0)


# Through Redis.


async def test_changes_come_through_redis_and_every_router_needs_one_snapshot(source, started, redis):
    await source.publish(redis.url)
    await source.hold(10)
    routers = [started(redis.url), started(redis.url)]
    await level(source, *routers)
    await source.hold(30)
    await source.hold(21)
    await level(source, *routers)
    assert [counted(router) for router in routers] == [(1, 0), (1, 0)]


async def test_a_redis_that_is_killed_is_noticed_and_what_it_missed_is_told_afterwards(source, started, start_redis):
    server = await asyncio.to_thread(start_redis)
    await source.publish(server.url)
    router = started(server.url)
    await level(source, router)
    await source.hold(10)
    await level(source, router)
    server.kill()
    await until(lambda: not router.follower.in_step)
    await source.hold(17)
    await source.hold(5)
    await asyncio.to_thread(server.start)
    await level(source, router)
    assert counted(router) == (1, 0)


async def test_what_redis_took_and_lost_is_noticed_by_a_sign_of_life(source, started, redis):
    await source.publish(redis.url)
    router = started(redis.url)
    await level(source, router)
    await source.hold(10)
    await level(source, router)
    with cut_off(router):
        await source.hold(14)
        await until(lambda: source.publisher._told == source.log.cursor)
        await asyncio.sleep(0.1)
        assert redis.ask("FLUSHALL") == "+OK"
    await level(source, router)
    assert counted(router) == (2, 1)


async def test_a_ring_that_overflowed_while_redis_was_away_is_made_good(source, started, start_redis):
    server = await asyncio.to_thread(start_redis)
    source.log._num_blocks_max = 4
    await source.publish(server.url)
    router = started(server.url)
    await level(source, router)
    server.kill()
    await source.hold(25)
    await asyncio.to_thread(server.start)
    await level(source, router)
    assert counted(router) == (2, 1)


async def test_words_of_a_former_life_count_no_more(source, started, redis):
    await source.publish(redis.url)
    router = started(redis.url)
    await source.hold(6)
    await level(source, router)
    old = source.log.cursor
    await source.hush()
    await source.restart()
    await source.publish(redis.url)
    await source.hold(8)
    await level(source, router)
    evicted = BlockEvent(kind=EventKind.EVICTED, hashes=CHAIN[0][:8])
    before = counted(router)
    for epoch in (old.epoch, public_epoch(old.epoch)):
        router.follower.take(Batch(cursor=Cursor(epoch=epoch, number=old.number + 1), events=(evicted,)))
    assert is_level(source, router) and counted(router) == before


async def test_another_process_with_the_deployments_key_does_not_speak_for_the_source(source, started, redis):
    """The other process can read all of Redis and sign with the deployment's key. The secret epoch is not in Redis."""
    await source.publish(redis.url)
    router = started(redis.url)
    await source.hold(6)
    await level(source, router)
    client = Redis.from_url(redis.url)
    stream, name = source.publisher._stream, source.publisher._name
    (_, last), *_ = await client.xrevrange(stream, count=1)
    assert last[b"e"] == public_epoch(source.log.cursor.epoch) != source.log.cursor.epoch
    before = counted(router)
    for epoch in (last[b"e"], b"", b"an epoch of mine"):
        gone = {"k": int(EventKind.EVICTED), "b": CHAIN[0][:8], "a": name, "n": source.log.cursor.number + 1}
        entry = EVENT_KEYS.sign(stream, {**gone, "s": time.time_ns()}, epoch=epoch)
        entry["e"] = last[b"e"]
        raw = {key.encode(): value if isinstance(value, bytes) else str(value).encode() for key, value in entry.items()}
        entry["m"] = event_seal._mac(EVENT_KEYS._keys[1], stream, raw)
        await client.xadd(stream, entry)
    await until(lambda: router.feed._reader.dropped[DropReason.FORGED] == 3)
    await client.aclose()
    assert is_level(source, router) and counted(router) == before
    await source.hold(8)
    await level(source, router)


async def test_what_redis_tells_again_counts_once(source, started, redis):
    await source.publish(redis.url)
    router = started(redis.url)
    await level(source, router)
    await source.hold(9)
    await source.hold(3)
    await level(source, router)
    # Read the stream again from an earlier entry.
    router.feed._reader._last = dict.fromkeys(router.feed._reader._last, "0-0")
    await source.hold(4)
    await level(source, router)
    assert counted(router) == (1, 0)


async def test_a_source_that_redis_hears_nothing_of_is_not_believed(source, started, redis, monkeypatch):
    monkeypatch.setattr(follower_module, "_SILENT_S", 0.5)
    await source.publish(redis.url)
    router = started(redis.url)
    await source.hold(5)
    await level(source, router)
    await source.hush()
    await until(lambda: not router.follower.in_step)
    await source.hold(2)
    await source.publish(redis.url)
    await level(source, router)
    assert router.follower.in_step


@pytest.mark.parametrize("turns", range(5))
async def test_what_ends_in_the_moment_of_news_does_end(source, started, redis, turns):
    await source.publish(redis.url)
    router = started(redis.url)
    await level(source, router)
    await source.hold(1)
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(AT_MOST_S):
        await source.hush()
    router.follower._wanted.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    ended, _ = await asyncio.wait([closing := asyncio.create_task(router.close())], timeout=AT_MOST_S)
    assert ended and closing.exception() is None


# The race: a snapshot is on its way while events come through Redis.


def paused(source, *, before_end):
    """The source's stream. Its snapshot pauses at the beginning or, with `before_end`, just before its end."""
    reached, go = asyncio.Event(), asyncio.Event()

    async def watch(cursor):
        async with contextlib.aclosing(source.watch(cursor)) as batches:
            if not before_end:
                reached.set()
                await go.wait()
            async for batch in batches:
                if before_end and batch.snapshot_ends:
                    reached.set()
                    await go.wait()
                yield batch

    return watch, reached, go


@pytest.mark.parametrize("before_end", [False, True], ids=["events older than it", "events newer than it"])
async def test_events_that_come_while_a_snapshot_is_taken_are_applied_on_top(source, started, redis, before_end):
    await source.publish(redis.url)
    await source.hold(6)
    watch, reached, go = paused(source, before_end=before_end)
    router = started(redis.url, watch)
    await reached.wait()
    for count in (12, 4, 9):
        await source.hold(count)
    waiting = router.follower._waiting
    await until(lambda: waiting and waiting[-1].cursor.number == source.log.cursor.number)
    go.set()
    # From the moment when the snapshot is complete, the router is never in step with wrong contents.
    while not router.follower.in_step:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert is_level(source, router)
    # An event sent before the router has its place in Redis is a gap, which costs only one more snapshot.
    assert counted(router) in ((1, 0), (2, 1))


async def test_more_events_than_may_wait_for_a_snapshot_mean_another_one(source, started, redis, monkeypatch):
    monkeypatch.setattr(follower_module, "_WAITING_MAX", 3)
    await source.publish(redis.url)
    watch, reached, go = paused(source, before_end=True)
    router = started(redis.url, watch)
    await reached.wait()
    await source.hold(10)
    waiting = router.follower._waiting
    await until(lambda: waiting and waiting[-1].cursor.number == source.log.cursor.number)
    go.set()
    await level(source, router)
    assert counted(router) == (2, 1)


async def test_a_source_that_restarts_while_its_snapshot_is_taken_is_asked_again(source, started, redis):
    await source.publish(redis.url)
    await source.hold(6)
    watch, reached, go = paused(source, before_end=True)
    router = started(redis.url, watch)
    await reached.wait()
    await source.hush()
    await source.restart()
    await source.publish(redis.url)
    await source.hold(8)
    go.set()
    await level(source, router)
    assert router.follower.in_step


async def test_a_snapshot_that_stalls_is_asked_for_again(source, started, redis, monkeypatch):
    monkeypatch.setattr(follower_module, "_PIECE_TIMEOUT_S", 0.2)
    calls = []

    async def stalling(cursor):
        calls.append(cursor)
        if len(calls) == 1:
            await asyncio.Event().wait()
        async with contextlib.aclosing(source.watch(cursor)) as batches:
            async for batch in batches:
                yield batch

    await source.publish(redis.url)
    await source.hold(6)
    await level(source, started(redis.url, stalling))
    assert calls == [None, None]
