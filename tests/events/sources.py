"""The two sources of events behind real services, and the routers' followers, with the same interface for both."""

import contextlib

from antefix import rpc
from antefix.events.event_seal import EventKeys
from antefix.events.event_wire import watch_memory
from antefix.events.redis_stream import StreamPublisher, memory_stream, store_stream
from antefix.record import RecordKind
from antefix.secret import Keyring
from antefix.store.remote_store import RemoteStore
from antefix.store.store_feed import StoreFeed
from antefix_router.placement.directory import Directory
from antefix_router.placement.memory_feed import MemoryFeed
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.router.memory_worker import Worker, leading
from tests.router.test_feed_of_a_store import serve

PROMPT = Prompt([7] * BLOCK * 40, payload_bytes=64)
CHAIN = PROMPT.hashes
EVENT_KEYS = EventKeys.of(Keyring(b"e" * 32))


class Source:
    """Holds the first blocks of CHAIN.  history: by event, the number of held blocks, which a follower must report."""

    def __init__(self):
        self.num_held = 0
        self.history = {}
        self.publisher = None

    def note(self):
        self.history[self.log.cursor] = self.num_held

    async def hold(self, count):
        """Add or remove blocks, one event each, until `count` are held."""
        while self.num_held != count:
            step = 1 if count > self.num_held else -1
            await self.change(self.num_held + step)
            self.num_held += step
            self.note()

    async def publish(self, url):
        publisher = StreamPublisher(url, self.log, self.stream_of(self.address), self.address, keys=EVENT_KEYS)
        self.publisher = await publisher.__aenter__()

    async def hush(self):
        if self.publisher is not None:
            await self.publisher.__aexit__(None, None, None)
            self.publisher = None

    async def snapshot(self):
        """The snapshot as the service reads it."""
        for piece in self.snapshot_now():
            yield piece


class MemorySource(Source):
    """A source that is a worker's memory."""

    stream_of = staticmethod(memory_stream)

    async def start(self, _):
        self.worker = await Worker().start()
        self.channel = rpc.channel(self.address)
        self.note()
        return self

    @property
    def address(self):
        return self.worker.address

    @property
    def log(self):
        return self.worker.memory.log

    async def change(self, count):
        self.worker.memory.store(CHAIN[:count])
        self.worker.memory.evict(CHAIN[count:])

    def snapshot_now(self):
        return self.log.snapshot()

    def watch(self, cursor=None):
        return watch_memory(self.channel, cursor)

    async def restart(self):
        await self.worker.restart()
        self.num_held = 0
        self.note()

    async def stop(self):
        await self.hush()
        await self.channel.close()
        await self.worker.stop()

    def router(self, redis_url="", watch=None):
        return MemoryRouter(self, redis_url, watch)


class MemoryRouter:
    """A router's knowledge of the worker.  watch: replaces the worker's own stream."""

    def __init__(self, source, redis_url, watch):
        self.source, self.directory = source, Directory()
        asked = watch_memory if watch is None else (lambda _, cursor: watch(cursor))
        self.feed = MemoryFeed(self.directory, redis_url=redis_url, keys=EVENT_KEYS, watch=asked)

    def start(self):
        self.feed.start()
        self.feed.follow([self.source.address])
        self.follower = self.feed._followers[self.source.address]

    def num_known(self):
        return leading(self.directory, self.source.address, CHAIN)

    async def close(self):
        await self.feed.close()


class StoreSource(Source):
    """A source that is a store."""

    stream_of = staticmethod(store_stream)

    async def start(self, directory):
        self.directory = directory
        self.servicer, self.server = await serve(directory)
        self.address = self.server.address
        self.store = RemoteStore(self.address)
        self.note()
        return self

    @property
    def log(self):
        return self.servicer.engine.events

    async def change(self, count):
        if count > self.num_held:
            self.servicer.engine.put([PROMPT.block(count - 1)])
        else:
            self.servicer.engine.evict([(RecordKind.BLOCK, CHAIN[count])])

    def snapshot_now(self):
        return self.servicer.engine.snapshot()

    def watch(self, cursor=None):
        return self.store.watch(cursor)

    async def restart(self):
        await self.server.drain(0)
        await self.servicer.close()
        self.servicer, self.server = await serve(self.directory, self.address)
        self.note()

    async def stop(self):
        await self.hush()
        await self.store.close()
        await self.server.drain(0)
        await self.servicer.close()

    def router(self, redis_url="", watch=None):
        return StoreRouter(self, redis_url, watch)


class StoreRouter:
    """A router's knowledge of the store.  watch: replaces the store's own stream."""

    def __init__(self, source, redis_url, watch):
        self.feed = self.follower = StoreFeed(
            watch or source.watch, fingerprint=FINGERPRINT, redis_url=redis_url, name=source.address, keys=EVENT_KEYS
        )

    def start(self):
        self.feed.start()

    def num_known(self):
        return len(self.feed)

    async def close(self):
        await self.feed.close()


def is_right(source, router):
    """Whether the router knows the source's content at its present event, if the router says that it is in step."""
    follower = router.follower
    return not follower.in_step or router.num_known() == source.history[follower._cursor]


def is_level(source, router):
    """Whether the router is in step with the source's last event, and will hear of the next one."""
    assert is_right(source, router)
    reader = router.feed._reader
    hears = reader is None or source.stream_of(source.address) in reader._last
    return hears and router.follower.in_step and router.follower._cursor == source.log.cursor


@contextlib.contextmanager
def cut_off(router):
    """Within this context, Redis' entries do not reach the router."""
    reader = router.feed._reader
    take, reader._take = reader._take, lambda name, batch: None
    try:
        yield
    finally:
        reader._take = take
