"""A worker's KV events on real sockets: numbered, replayed, and readable only with the right key."""

import asyncio
import stat

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from antefix.errors import ConfigError
from antefix.events.kv_publisher import KEPT_BATCHES_MAX, KvPublisher, KvPublisherConfig
from antefix.events.kv_sockets import CurveKey, guard_client, is_local
from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.slow

LOCAL = "tcp://127.0.0.1:0"
# A subscription takes a round trip after the handshake, and nothing reports its arrival.
SUBSCRIBED_S = 0.2


class Reader:
    """A subscriber that uses the documented frames and none of our code."""

    def __init__(self, publisher, guard=lambda socket: None, *, topic=b""):
        self.context = zmq.asyncio.Context()
        self.sub = self.context.socket(zmq.SUB)
        guard(self.sub)
        self.sub.subscribe(topic)
        self.connected = self.sub.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.sub.connect(publisher.endpoint)
        self.asking = self.context.socket(zmq.DEALER)
        guard(self.asking)
        if publisher.replay_endpoint:
            self.asking.connect(publisher.replay_endpoint)

    async def next(self):
        topic, number, payload = await asyncio.wait_for(self.sub.recv_multipart(), AT_MOST_S)
        return topic, int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)

    async def hears_nothing(self, seconds=0.3):
        try:
            await asyncio.wait_for(self.sub.recv_multipart(), seconds)
        except TimeoutError:
            return True
        return False

    async def again_from(self, number):
        await self.asking.send_multipart([b"", number.to_bytes(8, "big")])
        found = []
        while True:
            *_, number, payload = await asyncio.wait_for(self.asking.recv_multipart(), AT_MOST_S)
            if int.from_bytes(number, "big", signed=True) == -1:
                return found
            found.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)))

    def close(self):
        self.sub.disable_monitor()
        self.connected.close(0)
        self.sub.close(0)
        self.asking.close(0)
        self.context.term()


@pytest.fixture
async def tell():
    """tell(**settings) -> a started publisher; read(publisher) -> a subscriber to that publisher."""
    opened = []

    def start(**settings):
        publisher = KvPublisher(KvPublisherConfig(**{"endpoint": LOCAL, "replay": LOCAL, "block_size": 2, **settings}))
        publisher.start()
        opened.append(publisher)
        return publisher

    yield start
    for publisher in opened:
        await publisher.close()


@pytest.fixture
async def read():
    opened = []

    async def start(publisher, *args, is_let_in=True, **options):
        reader = Reader(publisher, *args, **options)
        opened.append(reader)
        if is_let_in:
            await asyncio.wait_for(reader.connected.recv_multipart(), AT_MOST_S)
        await asyncio.sleep(SUBSCRIBED_S)
        return reader

    yield start
    for reader in opened:
        reader.close()


def tell_chain(publisher, *names, parent=None, salt=""):
    for number, name in enumerate(names):
        publisher.stored(name, parent=parent, tokens=np.array([number, number + 1], np.uint32), salt=salt)
        parent = name


async def test_blocks_that_follow_each_other_are_one_event(tell, read):
    publisher = tell(topic="kv@here")
    reader = await read(publisher, topic=b"kv@")
    tell_chain(publisher, b"a", b"b")
    tell_chain(publisher, b"x")
    publisher.evicted(b"b")
    publisher.evicted(b"a")
    topic, number, (_, events, rank) = await reader.next()
    assert (topic, number, rank) == (b"kv@here", 0, 0)
    assert [event["type"] for event in events] == ["BlockStored", "BlockStored", "BlockRemoved"]
    assert events[0]["block_hashes"] == [b"a", b"b"]
    assert events[0]["token_ids"] == [0, 1, 1, 2]
    assert events[0]["parent_block_hash"] is None
    assert events[2]["block_hashes"] == [b"b", b"a"]


async def test_each_turn_of_the_loop_is_one_numbered_message(tell, read):
    publisher = tell()
    reader = await read(publisher)
    for name in (b"a", b"b", b"c"):
        tell_chain(publisher, name)
        await asyncio.sleep(0)
    assert [(await reader.next())[1] for _ in range(3)] == [0, 1, 2]


async def test_a_tenants_blocks_carry_its_salt_at_their_beginning_alone(tell, read):
    publisher = tell()
    reader = await read(publisher)
    tell_chain(publisher, b"a", b"b", salt="whose")
    tell_chain(publisher, b"c", parent=b"b", salt="whose")
    (event,) = (await reader.next())[2][1]
    assert event["extra_keys"] == [["whose"], None, None]


async def test_two_tenants_blocks_are_never_one_event(tell, read):
    publisher = tell()
    reader = await read(publisher)
    tell_chain(publisher, b"a", salt="one")
    tell_chain(publisher, b"b", parent=b"a", salt="another")
    assert len((await reader.next())[2][1]) == 2


async def test_what_was_missed_is_given_again(tell, read):
    publisher = tell()
    for name in (b"a", b"b", b"c"):
        tell_chain(publisher, name)
        await asyncio.sleep(0)
    reader = await read(publisher)
    found = await reader.again_from(1)
    assert [(number, events[0]["block_hashes"]) for number, (_, events, _) in found] == [(1, [b"b"]), (2, [b"c"])]
    assert publisher.counters.num_replays == 1


async def test_an_invalid_request_is_ignored(tell, read):
    publisher = tell()
    tell_chain(publisher, b"a")
    await asyncio.sleep(0)
    reader = await read(publisher)
    for frames in ([b"", b"short"], [b"x"], [b"", bytes(8), b"more"]):
        await reader.asking.send_multipart(frames)
    assert len(await reader.again_from(0)) == 1


async def test_what_is_kept_is_bounded(tell, read, monkeypatch):
    monkeypatch.setattr("antefix.events.kv_publisher.KEPT_BYTES_MAX", 2_000)
    publisher = tell()
    for number in range(50):
        tell_chain(publisher, b"%d" % number)
        await asyncio.sleep(0)
    reader = await read(publisher)
    found = await reader.again_from(0)
    assert 1 < len(found) < 20
    assert found[-1][0] == 49
    assert KEPT_BATCHES_MAX == 10_000


async def test_a_named_client_alone_reads_what_is_encrypted(tell, read, tmp_path):
    friend, stranger = CurveKey.from_file(tmp_path / "friend"), CurveKey.from_file(tmp_path / "stranger")
    key_file = tmp_path / "server"
    publisher = tell(key_file=str(key_file), clients=(friend.public.decode(),))
    server = CurveKey.from_file(key_file).public
    reader = await read(publisher, lambda socket: guard_client(socket, friend, server))
    without_a_key = await read(publisher, is_let_in=False)
    unnamed = await read(publisher, lambda socket: guard_client(socket, stranger, server), is_let_in=False)
    tell_chain(publisher, b"a")
    assert (await reader.next())[2][1][0]["block_hashes"] == [b"a"]
    assert len(await reader.again_from(0)) == 1
    assert await without_a_key.hears_nothing()
    assert await unnamed.hears_nothing()


def test_a_key_is_made_once_and_is_its_owners(tmp_path):
    key = CurveKey.from_file(tmp_path / "key")
    assert CurveKey.from_file(tmp_path / "key").public == key.public
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    (tmp_path / "wrong").write_text("not a key")
    with pytest.raises(ConfigError, match="CURVE"):
        CurveKey.from_file(tmp_path / "wrong")


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:5557", "tcp://*:5557", "tcp://10.0.0.1:5557", "tcp://[::]:1", "tcp://host:1"]
)
def test_token_ids_do_not_leave_the_host_in_the_clear(endpoint):
    with pytest.raises(ConfigError, match="token ids"):
        KvPublisherConfig(endpoint=endpoint)
    with pytest.raises(ConfigError, match="token ids"):
        KvPublisherConfig(endpoint=LOCAL, replay=endpoint)
    with pytest.raises(ConfigError, match="clients"):
        KvPublisherConfig(endpoint=endpoint, key_file="key")
    with pytest.raises(ConfigError, match="public key"):
        KvPublisherConfig(endpoint=endpoint, key_file="key", clients=("short",))


@pytest.mark.parametrize(
    "endpoint", ["", "http://x", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:port", "tcp://127.0.0.1:70000"]
)
def test_an_invalid_address_is_refused(endpoint):
    with pytest.raises(ConfigError):
        KvPublisherConfig(endpoint=endpoint or "x")


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:1", "tcp://127.8.9.1:1", "tcp://[::1]:1", "tcp://localhost:1", "ipc:///tmp/x"]
)
def test_loopback_is_local(endpoint):
    assert is_local(endpoint)


async def test_an_address_in_use_is_said(tell):
    publisher = tell()
    with pytest.raises(ConfigError, match="in use"):
        tell(endpoint=publisher.endpoint)
