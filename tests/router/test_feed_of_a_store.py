"""The feed agrees with the real store's look-ups after puts, evictions, kills and restarts."""

from antefix import rpc
from antefix.errors import Unavailable
from antefix.events.block_events import keys_of
from antefix.record import RecordKind
from antefix.store.remote_store import RemoteStore
from antefix.store.store_feed import StoreFeed
from antefix.v1 import kvstore_pb2
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt, owner
from tests.waiting import until

PROMPTS = [Prompt([number] * BLOCK * 5) for number in range(4)]


async def serve(directory, address="127.0.0.1:0"):
    servicer = KvStoreServicer(StorageEngine(KvStoreConfig(dir=str(directory), budget_bytes=256 << 20)))
    server = await rpc.start_server(address, lambda target: register(servicer, target), [kvstore_pb2.DESCRIPTOR])
    return servicer, server


async def in_step(feed, store):
    """Whether the feed eventually agrees with a look-up for every prompt."""

    async def agreed():
        looked = [(await store.lookup(p.hashes, fingerprint=FINGERPRINT)).num_blocks for p in PROMPTS]
        return looked if [feed.num_leading(keys_of(p.hashes)) for p in PROMPTS] == looked else None

    return await until(agreed)


async def put(store, records):
    """Put records, and retry until the channel has connected again after the store was down."""
    return await until(lambda: store.put(records), "the store takes records", despite=Unavailable)


async def test_the_feed_says_what_a_lookup_says(tmp_path, monkeypatch):
    monkeypatch.setattr("antefix.events.follower._RETRY_S", 0.05)
    servicer, server = await serve(tmp_path)
    store = RemoteStore(server.address)
    feed = StoreFeed(store.watch, fingerprint=FINGERPRINT)
    try:
        await store.put(PROMPTS[0].blocks())
        feed.start()
        assert await in_step(feed, store) == [5, 0, 0, 0]
        await store.put(PROMPTS[1].blocks())
        assert await in_step(feed, store) == [5, 5, 0, 0]
        await store.evict([(RecordKind.BLOCK, PROMPTS[0].hashes[3])], owner=owner(""))
        assert (await in_step(feed, store))[:2] == [3, 5]
        # A restarted store has a new epoch, which needs a new snapshot.
        await server.drain(0.2)
        await servicer.close()
        servicer, server = await serve(tmp_path, server.address)
        await put(store, PROMPTS[2].blocks())
        assert await in_step(feed, store) == [3, 5, 5, 0]
        assert feed.counters.num_snapshots == 2
    finally:
        await feed.close()
        await store.close()
        await server.drain(0.2)
        await servicer.close()
