"""Keys change while routers run, through their file or a real Redis. Attackers who write to Redis gain nothing."""

import asyncio
import dataclasses

import pytest
from redis.asyncio import Redis

from antefix.errors import Conflict, Unauthenticated, Unavailable
from antefix.redis_access import RedisAccess
from antefix.secret import Keyring
from antefix_billing import api_keys, key_file
from antefix_billing.api_keys import KeyBook, new_key
from antefix_billing.key_register import KeyRegister
from antefix_console.cli import main
from antefix_router import key_changes
from antefix_router.key_changes import KeyChanges
from antefix_router.key_exchange import ForgedKeys, KeyExchange
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.slow

KEYRING = Keyring(b"k" * 32)
REDIS_KEY = "antefix:api-keys"


class Router:
    """The parts of a router that know keys."""

    def __init__(self, path, url="", keyring=KEYRING):
        self.register = KeyRegister()
        exchange = KeyExchange(RedisAccess(url=url), keyring) if url else None
        self.changes = KeyChanges(self.register, path, exchange)
        self.register.take(key_file.read_book(path))
        self.changes.start()

    def lets_in(self, text):
        try:
            return bool(self.register.authenticate(text).tenant)
        except Unauthenticated:
            return False


@pytest.fixture
async def routers(tmp_path):
    made = []

    def make(name, url="", keyring=KEYRING):
        path = tmp_path / f"{name}.json"
        key_file.create_book(path)
        made.append(Router(path, url, keyring))
        return made[-1]

    yield make
    for router in made:
        await router.changes.close()


async def command(*args):
    """Run the command in a thread, because it has its own event loop."""
    assert await asyncio.to_thread(main, ["keys", *map(str, args)]) == 0


async def test_a_change_of_the_file_is_in_force_on_all_its_routers_within_5_s(routers, tmp_path):
    one, other = routers("keys"), routers("keys")
    path = tmp_path / "keys.json"
    for number in range(2):
        out = tmp_path / f"{number}.key"
        await command("create", "acme", "--file", path, "--output", out)
        text = out.read_text().strip()
        await until(lambda text=text: one.lets_in(text) and other.lets_in(text))
        await command("revoke", key_file.read_book(path).keys[-1].id, "--file", path)
        await until(lambda text=text: not one.lets_in(text) and not other.lets_in(text))


@pytest.mark.parametrize("fault", ["gone", "garbage", "writable", "older", "empty"])
async def test_a_faulty_file_never_lets_more_in_than_before(fault, routers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(key_changes, "LOOK_S", 0.02)
    path = tmp_path / "keys.json"
    text, key = new_key("acme")
    gone, revoked = new_key("acme")
    book = KeyBook().added(key).added(revoked)
    key_file.write_book(path, api_keys.revoke(book, revoked.id))
    router = routers("keys")
    if fault == "gone":
        path.unlink()
    elif fault == "writable":
        key_file.write_book(path, dataclasses.replace(book, number=9))
        path.chmod(0o666)
    elif fault == "older":
        key_file.write_book(path, book)
    else:
        path.write_text("" if fault == "empty" else "{}")
    await until(lambda: "stay as they were" in caplog.text or "are older" in caplog.text)
    assert router.lets_in(text)
    assert not router.lets_in(gone)
    assert not router.lets_in("")
    # The router recovers by itself.
    path.unlink(missing_ok=True)
    key_file.write_book(path, api_keys.revoke(router.register.book, key.id))
    await until(lambda: not router.lets_in(text))
    assert router.changes.num_errors["file"] > 0 or fault == "older"


async def test_a_change_reaches_routers_on_other_hosts_through_redis(routers, redis, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text((b"k" * 32).hex())
    one, other = routers("host-1", redis.url), routers("host-2", redis.url)
    there = ("--redis", redis.url, "--secret-file", secret)
    await command("create", "acme", "--file", tmp_path / "host-1.json", "--output", tmp_path / "acme.key", *there)
    text = (tmp_path / "acme.key").read_text().strip()
    await until(lambda: one.lets_in(text) and other.lets_in(text))
    # Wait until the other host's file has the change. A router that starts later without Redis reads it there.
    await until(lambda: key_file.read_book(tmp_path / "host-2.json").number == 1)
    # A command on any host continues from the changes of other hosts.
    await command("revoke", one.register.book.keys[0].id, "--file", tmp_path / "host-2.json", *there)
    await until(lambda: not one.lets_in(text) and not other.lets_in(text))


async def test_whoever_writes_to_redis_makes_no_key(routers, redis, tmp_path, monkeypatch):
    monkeypatch.setattr(key_changes, "LOOK_S", 0.02)
    router = routers("host", redis.url)
    text, key = new_key("victim")
    book = dataclasses.replace(KeyBook().added(key), number=50)
    forged = api_keys.to_json(book)
    attempts = [
        {"number": 50, "book": forged, "mac": b"\0" * 32},
        {"number": 50, "book": forged, "mac": Keyring(b"x" * 32).proof(b"api-keys", forged.encode())},
        # This deployment signed these bytes for another purpose.
        {"number": 50, "book": forged, "mac": KEYRING.proof(forged.encode())},
        {"number": 50, "book": "x" * 1000, "mac": b""},
        {"number": "9" * 30},
        {"number": "-1", "book": forged},
        {"number": "x"},
    ]
    async with Redis.from_url(redis.url) as attacker:
        for fields in attempts:
            await attacker.delete(REDIS_KEY)
            await attacker.hset(REDIS_KEY, mapping=fields)
            before = router.changes.num_errors["redis"]
            await until(lambda before=before: router.changes.num_errors["redis"] > before)
            assert not router.lets_in(text)
        # A Redis key of another type does not stop the router from looking again.
        await attacker.delete(REDIS_KEY)
        await attacker.set(REDIS_KEY, "x")
        before = router.changes.num_errors["redis"]
        await until(lambda: router.changes.num_errors["redis"] > before)
        await attacker.flushall()
    exchange = KeyExchange(RedisAccess(url=redis.url), KEYRING)
    await exchange.put(dataclasses.replace(book, number=51))
    await until(lambda: router.lets_in(text))
    await exchange.close()


async def test_an_old_book_put_back_revives_no_revoked_key(routers, redis, tmp_path, monkeypatch):
    monkeypatch.setattr(key_changes, "LOOK_S", 0.02)
    router = routers("host", redis.url)
    exchange = KeyExchange(RedisAccess(url=redis.url), KEYRING)
    text, key = new_key("acme")
    book = KeyBook().added(key)
    await exchange.put(book)
    await until(lambda: router.lets_in(text))
    async with Redis.from_url(redis.url) as attacker:
        kept = await attacker.hgetall(REDIS_KEY)
        await exchange.put(api_keys.revoke(book, key.id))
        await until(lambda: not router.lets_in(text))
        await attacker.delete(REDIS_KEY)
        # The unsigned number claims a newer book, but only the signed number counts.
        await attacker.hset(REDIS_KEY, mapping={**kept, b"number": b"99"})
        await asyncio.sleep(0.3)
        assert not router.lets_in(text)
        # A router that starts now uses its file, which has the newest book that this host has seen.
        assert not routers("host", redis.url).lets_in(text)
    await exchange.close()


async def test_it_stops_also_when_an_answer_comes_at_the_same_moment(tmp_path, monkeypatch):
    answer = asyncio.get_running_loop().create_future()

    async def hget(*args):
        return await answer

    path = tmp_path / "keys.json"
    key_file.create_book(path)
    router = Router(path, "redis://127.0.0.1:1")
    monkeypatch.setattr(router.changes._exchange._redis, "hget", hget)
    await asyncio.sleep(0.1)
    answer.set_result(None)
    await asyncio.sleep(0)
    async with asyncio.timeout(AT_MOST_S):
        await router.changes.close()
    assert router.changes._task.done()


async def test_two_who_change_keys_at_once_do_not_undo_each_other(redis):
    exchange = KeyExchange(RedisAccess(url=redis.url), KEYRING)
    book = KeyBook().added(new_key("a")[1])
    await exchange.put(book)
    await exchange.put(book.added(new_key("b")[1]))
    with pytest.raises(Conflict):
        await exchange.put(book.added(new_key("c")[1]))
    assert [key.tenant for key in (await exchange.get()).keys] == ["a", "b"]
    assert await exchange.get(newer_than=2) is None
    await exchange.close()


async def test_while_secrets_rotate_keys_of_the_older_one_are_believed(redis):
    older = KeyExchange(RedisAccess(url=redis.url), Keyring(b"k" * 32))
    both = KeyExchange(RedisAccess(url=redis.url), Keyring(b"n" * 32, generation=2, older={1: b"k" * 32}))
    await older.put(KeyBook().added(new_key("a")[1]))
    book = await both.get()
    await both.put(book.added(new_key("b")[1]))
    with pytest.raises(ForgedKeys):
        await older.get()
    await asyncio.gather(older.close(), both.close())


async def test_without_redis_what_is_known_goes_on(routers, start_redis, tmp_path, monkeypatch):
    monkeypatch.setattr(key_changes, "LOOK_S", 0.02)
    server = await asyncio.to_thread(start_redis)
    text, key = new_key("acme")
    key_file.write_book(tmp_path / "host.json", KeyBook().added(key))
    router = routers("host", server.url)
    server.kill()
    await until(lambda: router.changes.num_errors["redis"] > 0)
    assert router.lets_in(text)
    exchange = KeyExchange(RedisAccess(url=server.url), KEYRING)
    with pytest.raises(Unavailable):
        await exchange.get()
    await exchange.close()


async def test_the_value_in_redis_holds_no_key(routers, redis):
    text, key = new_key("acme")
    exchange = KeyExchange(RedisAccess(url=redis.url), KEYRING)
    await exchange.put(KeyBook().added(key))
    async with Redis.from_url(redis.url) as reader:
        held = b"".join((await reader.hgetall(REDIS_KEY)).values())
    assert text.rpartition("-")[2].encode() not in held
    assert (await exchange.get()).keys == (key,)
    await exchange.close()
