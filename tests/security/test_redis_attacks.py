"""An attacker can write to Redis: forged entries are detected, dropped and counted. Also tests connections to Redis."""

import asyncio
import dataclasses
import socket
import stat
import subprocess
import time

import pytest
import xxhash
from redis.asyncio import Redis

from antefix.errors import ConfigError, Unavailable
from antefix.events import event_seal, redis_stream
from antefix.events.block_events import EventKind
from antefix.events.event_seal import DropReason, EventKeys
from antefix.record import Record, RecordKind
from antefix.redis_access import RedisAccess, check_redis_url
from antefix.secret import Keyring
from antefix.security.certificates import issue, make_ca
from antefix.store_files.record_format import payload_checksum
from antefix.store_files.record_header import RECORD_HEADER_BYTES
from antefix.store_files.seal import Seals
from antefix.window_pool import RedisWindowPool, check_address
from antefix.window_pool.pool_format import HEADER_BYTES, pack
from antefix.window_pool.redis_pool import key_of
from tests.events.sources import CHAIN, EVENT_KEYS, MemorySource
from tests.redis_servers import RedisServer
from tests.waiting import until, wait_until

KEYRING = Keyring(b"k" * 32)
FINGERPRINT = b"f" * 32
NAMES = [bytes([n]) * 32 for n in range(1, 5)]
MINE, THEIRS = KEYRING.owner("mine"), KEYRING.owner("theirs")


def checkpoint(name=NAMES[0], payload=b"window state" * 1000, tenant=MINE, **changes):
    record = Record(
        kind=RecordKind.CHECKPOINT, hash=name, parent=b"p" * 32, fingerprint=FINGERPRINT, position=128,
        payload=payload, tenant=tenant, ttl_s=60.0,
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


@pytest.fixture
async def pool(redis):
    made = RedisWindowPool(redis.url, bytes_max=1 << 30, seals=Seals(KEYRING))
    yield made
    await made.close()


@pytest.fixture
async def attacker(redis):
    async with Redis.from_url(redis.url) as direct:
        yield direct


async def is_taken(pool, name=NAMES[0], tenant=MINE):
    found = await pool.nearest([name], fingerprint=FINGERPRINT, tenant=tenant)
    return found is not None


SEALS = Seals(KEYRING)
RIGHT = SEALS.seal(checkpoint())
# Each value has right checksums, which an attacker can compute: `pack` makes them for any content.
FORGED = {
    "another payload under the right header and seal": dataclasses.replace(RIGHT, payload=b"another state" * 1000),
    "one bit": dataclasses.replace(RIGHT, payload=bytes([RIGHT.payload[0] ^ 1]) + RIGHT.payload[1:]),
    "no seal": checkpoint(),
    "a seal of another secret": Seals(Keyring(b"x" * 32)).seal(checkpoint()),
    "a seal of an unknown generation": dataclasses.replace(RIGHT, generation=9),
    "another position": dataclasses.replace(RIGHT, position=256),
    "another parent": dataclasses.replace(RIGHT, parent=b"q" * 32),
    "another tenant's, sealed": SEALS.seal(checkpoint(tenant=THEIRS)),
    "the right one, said to be another tenant's": dataclasses.replace(RIGHT, tenant=THEIRS),
    "another block's, said to be this one": dataclasses.replace(SEALS.seal(checkpoint(NAMES[1])), hash=NAMES[0]),
    "another model's, said to be this one's": dataclasses.replace(
        SEALS.seal(checkpoint(fingerprint=b"g" * 32)), fingerprint=FINGERPRINT
    ),
}


@pytest.mark.parametrize("record", FORGED.values(), ids=FORGED.keys())
async def test_a_forged_checkpoint_with_right_checksums_is_dropped_and_counted(record, pool, attacker):
    await pool.put(RIGHT)
    assert await is_taken(pool)
    await attacker.set(key_of(NAMES[0], FINGERPRINT), pack(record))
    assert not await is_taken(pool)
    assert (pool.num_corrupt, pool.num_forged) == (1, 1)
    assert await attacker.get(key_of(NAMES[0], FINGERPRINT)) is None


async def test_a_value_with_a_recomputed_xxh3_gives_no_answer(pool, attacker):
    """The value is built byte by byte, as by an attacker who has read docs/FORMAT.md and has none of our code."""
    await pool.put(RIGHT)
    key = key_of(NAMES[0], FINGERPRINT)
    value = bytearray(await attacker.get(key))
    value[HEADER_BYTES:] = b"Z" * (len(value) - HEADER_BYTES)
    value[16:32] = payload_checksum(memoryview(value)[HEADER_BYTES:])
    value[8:16] = xxhash.xxh3_64_intdigest(bytes(value[16:RECORD_HEADER_BYTES]), seed=0).to_bytes(8, "little")
    await attacker.set(key, bytes(value))
    assert not await is_taken(pool)
    assert pool.num_forged == 1


@pytest.mark.parametrize("value", [b"", b"x", b"\0" * 255, b"\0" * 256, b"\xff" * 5000, b"AFXRECD2" + b"\0" * 300])
async def test_garbage_is_dropped_and_counted(value, pool, attacker):
    await attacker.set(key_of(NAMES[0], FINGERPRINT), value)
    assert not await is_taken(pool)
    assert pool.num_corrupt == 1


async def test_a_tenant_does_not_resume_from_anothers_checkpoint(pool):
    await pool.put(SEALS.seal(checkpoint(tenant=THEIRS)))
    assert await is_taken(pool, tenant=THEIRS)
    assert not await is_taken(pool, tenant=MINE)


# Events in Redis.


@pytest.fixture
async def feed(redis, monkeypatch, tmp_path):
    """A worker that sends events to Redis, a router that reads them, and the name of the worker's stream."""
    monkeypatch.setattr(redis_stream, "_RETRY_S", 0.05)
    monkeypatch.setattr(redis_stream, "ALIVE_S", 0.2)
    monkeypatch.setattr("antefix.events.follower._RETRY_S", 0.05)
    source = await MemorySource().start(tmp_path)
    await source.publish(redis.url)
    router = source.router(redis.url)
    router.start()
    stream = source.stream_of(source.address)
    await until(lambda: router.follower.in_step and stream in router.feed._reader._last)
    await source.hold(10)
    await until(lambda: router.num_known() == 10)
    yield source, router, stream
    await router.close()
    await source.stop()


def dropped(router, why):
    return router.feed.dropped[why]


async def add(attacker, stream, fields):
    await attacker.xadd(stream, fields)


async def test_events_that_were_not_signed_here_teach_a_router_nothing(feed, attacker):
    source, router, stream = feed
    # Every signed entry with one field changed, and entries that were never signed.
    ((_, entry),) = await attacker.xrevrange(stream, count=1)
    stored = b"".join(name[:8] for name in CHAIN[10:20])
    plain = {b"a": entry[b"a"], b"e": entry[b"e"], b"n": 11, b"k": int(EventKind.STORED), b"b": stored}
    fresh = {**plain, b"s": time.time_ns()}
    named = {name.decode(): value for name, value in fresh.items()}
    stranger = EventKeys.of(Keyring(b"x" * 32)).sign(stream, named, epoch=source.log.cursor.epoch)
    entry[b"s"] = str(time.time_ns()).encode()
    changes = [
        *({**entry, name: value} for name, value in ((b"n", b"11"), (b"b", stored), (b"k", b"2"), (b"f", b"f" * 32))),
        *({**entry, name: value} for name, value in ((b"g", b"7"), (b"m", b""), (b"m", b"\0" * 16), (b"e", b"other"))),
        {**entry, b"s": str(time.time_ns() + 1)},
        plain,
        {**fresh, b"g": 1, b"m": b"\0" * 16},
        stranger,
        {"x": "y"},
    ]
    settled = router.feed.counters.num_snapshots
    for number, fields in enumerate(changes, 1):
        await add(attacker, stream, fields)
        await until(lambda number=number: sum(router.feed.dropped.values()) >= number)
    assert dropped(router, DropReason.FORGED) == len(changes)
    assert router.num_known() == 10
    assert router.feed.counters.num_snapshots == settled
    # Valid events still arrive.
    await source.hold(15)
    await until(lambda: router.num_known() == 15)


async def test_events_told_again_or_in_another_stream_count_no_more(feed, attacker):
    _, router, stream = feed
    entries = [fields for _, fields in await attacker.xrange(stream)]
    assert len(entries) > 3
    for fields in entries:
        await add(attacker, stream, fields)
    await until(lambda: dropped(router, DropReason.REPLAYED) == len(entries))
    for other in redis_stream.MEMORY_STREAMS:
        if other != stream:
            await add(attacker, other, entries[0])
    await until(lambda: dropped(router, DropReason.FORGED) == len(redis_stream.MEMORY_STREAMS) - 1)
    assert router.num_known() == 10


async def test_an_old_sign_of_life_does_not_keep_a_dead_source_alive(feed, attacker, monkeypatch):
    """The attacker cuts the source off and replays its heartbeats."""
    monkeypatch.setattr("antefix.events.follower._SILENT_S", 0.6)
    source, router, stream = feed
    await asyncio.sleep(0.5)
    kept = [fields for _, fields in await attacker.xrange(stream)]
    await source.hush()
    await until(lambda: not router.follower.in_step)
    for fields in kept:
        await add(attacker, stream, fields)
    await until(lambda: dropped(router, DropReason.REPLAYED) >= len(kept))
    assert not router.follower.in_step
    assert dropped(router, DropReason.REPLAYED) == len(kept)


def test_an_entry_that_was_kept_back_for_long_counts_no_more(monkeypatch):
    check = event_seal.EventCheck(EVENT_KEYS)

    def entry(stamp):
        fields = {"a": "w", "e": b"e", "n": 1, "k": 0, "s": stamp}
        signed = EVENT_KEYS.sign("stream", fields, epoch=b"e")
        return {
            key.encode(): value if isinstance(value, bytes) else str(value).encode() for key, value in signed.items()
        }

    now = time.time_ns()
    assert not check.lets_in("stream", entry(now - int(301e9)))
    assert not check.lets_in("stream", entry(now + int(301e9)))
    assert check.lets_in("stream", entry(now - int(200e9)))
    assert check.lets_in("stream", entry(now))
    assert check.dropped[DropReason.REPLAYED] == 2


# Connections to Redis.


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://user:canary@127.0.0.1", "has a password"),
        ("rediss://:canary@redis.example:6379/0", "has a password"),
        ("redis://127.0.0.1/0?password=canary", "that the URL may have is db"),
        ("rediss://redis.example?ssl_cert_reqs=none", "that the URL may have is db"),
        ("rediss://redis.example?ssl_check_hostname=false", "that the URL may have is db"),
        ("redis://10.0.0.5:6379", "unencrypted"),
        ("redis://redis.example", "unencrypted"),
        ("redis+cluster://redis.example:7000", "unencrypted"),
        ("redis://", "no host"),
        ("rediss:///0", "no host"),
        ("unix://", "path"),
        ("http://127.0.0.1", "must be a URL of Redis"),
        ("redis://[::1", "not a URL"),
        ("redis://127.0.0.1:canary@", "has a password"),
        ("redis://127.0.0.1:port", "not a URL"),
        ("redis://:canary/password@127.0.0.1", "not a URL"),
        ("redis://:canary#password@127.0.0.1", "not a URL"),
    ],
)
def test_a_url_that_would_give_something_away_is_refused_everywhere(url, why):
    with pytest.raises(ConfigError, match=why) as caught:
        check_redis_url(url)
    assert "canary" not in str(caught.value)
    with pytest.raises(ConfigError):
        check_address(url)
    with pytest.raises(ConfigError):
        RedisAccess(url=url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:6379/0",
        "redis://localhost",
        "redis://[::1]:6379/2",
        "rediss://antefix@redis.example:6380/0",
        "unix:///run/redis.sock?db=1",
        "redis+cluster://127.0.0.1:7000",
        "rediss+cluster://redis.example:7000",
    ],
)
def test_other_urls_are_taken(url):
    check_redis_url(url)
    client = RedisAccess(url=url).connect(timeout_s=1.0)
    assert ("Cluster" in type(client).__name__) == ("cluster" in url)


class TlsRedis(RedisServer):
    """A Redis with TLS only, and a user with a password who may run the commands that Antefix uses."""

    def __init__(self, directory, creds, password):
        super().__init__(
            directory,
            *("--tls-cert-file", creds / "tls.crt", "--tls-key-file", creds / "tls.key"),
            *("--tls-ca-cert-file", creds / "ca.crt", "--tls-auth-clients", "no"),
            *("--user", "antefix", "on", f">{password}", "~antefix:*", "+@all", "-@dangerous", "+info"),
            *("--user", "default", "off"),
        )
        self.flags = (*map(str, self.flags), "--tls-port", str(self.port), "--port", "0")

    def start(self):
        self.process = subprocess.Popen(
            [self.binary, "--bind", "127.0.0.1", "--save", "", "--dir", self.directory, *self.flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def answers():
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                return False
            return True

        wait_until(answers, "redis-server answers")
        return self


@pytest.fixture(scope="module")
def tls_redis(tmp_path_factory):
    directory = tmp_path_factory.mktemp("redis")
    make_ca(directory / "ca")
    make_ca(directory / "other-ca")
    issue(directory / "ca", directory / "creds", "kvstore", "redis", hosts=("127.0.0.1",))
    server = TlsRedis(directory, directory / "creds", "canary-password")
    server.start()
    yield server, directory
    server.kill()


def access(tls_redis, tmp_path, *, password="canary-password", ca="ca", host="127.0.0.1", user="antefix"):
    server, directory = tls_redis
    path = tmp_path / "redis.password"
    path.write_text(password + "\n")
    at = f"{user}@{host}" if user else host
    return RedisAccess(
        url=f"rediss://{at}:{server.port}/0",
        password_file=str(path) if password else "",
        ca_file=str(directory / ca / "ca.crt"),
    )


@pytest.mark.services
async def test_redis_over_tls_with_user_and_password(tls_redis, tmp_path):
    pool = RedisWindowPool(access(tls_redis, tmp_path), bytes_max=1 << 30, seals=SEALS)
    assert await pool.put(RIGHT)
    assert await is_taken(pool)
    # The file is read at each connection, so a new password needs no restart.
    (tmp_path / "redis.password").write_text("canary-changed")
    await pool._redis.connection_pool.disconnect()
    with pytest.raises(Unavailable):
        await pool.check()
    await pool.close()


@pytest.mark.services
@pytest.mark.parametrize(
    "wrong",
    [{"password": "canary-wrong"}, {"password": ""}, {"ca": "other-ca"}, {"host": "localhost"}, {"user": "canary-me"}],
    ids=str,
)
async def test_nothing_falls_back_where_tls_or_a_password_is_wrong_and_none_is_told(wrong, tls_redis, tmp_path, caplog):
    right = RedisWindowPool(access(tls_redis, tmp_path), bytes_max=1 << 30, seals=SEALS)
    await right.check()
    await right.close()
    pool = RedisWindowPool(access(tls_redis, tmp_path, **wrong), bytes_max=1 << 30, seals=SEALS, timeout_s=2.0)
    with pytest.raises(Unavailable) as caught:
        await pool.put(RIGHT)
    assert "canary" not in str(caught.value) + caplog.text
    await pool.close()


@pytest.mark.services
async def test_a_server_without_tls_is_not_talked_to_in_clear(redis, tmp_path):
    url = redis.url.replace("redis://", "rediss://")
    pool = RedisWindowPool(RedisAccess(url=url), bytes_max=1 << 30, timeout_s=2.0)
    with pytest.raises(Unavailable):
        await pool.put(RIGHT)
    await pool.close()


def test_a_password_file_that_others_may_read_stops_the_start(tmp_path):
    path = tmp_path / "password"
    path.write_text("canary")
    path.chmod(0o644)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        RedisAccess(url="redis://127.0.0.1", password_file=str(path))
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "no certificate"])
def test_a_wrong_ca_file_stops_the_start(text, tmp_path):
    path = tmp_path / "ca.crt"
    path.write_text(text)
    for ca_file in (path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="redis_ca_file"):
            RedisAccess(url="rediss://redis.example", ca_file=str(ca_file))
    with pytest.raises(ConfigError, match="rediss"):
        RedisAccess(url="redis://127.0.0.1", ca_file=str(path))


def test_whoever_looks_at_the_access_sees_no_password(tmp_path):
    path = tmp_path / "password"
    path.write_text("canary")
    made = RedisAccess(url="rediss://antefix@redis.example", password_file=str(path))
    assert "canary" not in repr(made) + repr(made.connect(timeout_s=1.0))
