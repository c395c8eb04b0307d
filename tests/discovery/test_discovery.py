"""Services start, stop and move. DNS and Redis report these changes late, in part or not at all."""

import asyncio
import json

import pytest

from antefix.discovery import DnsName, Following, Found, LeaseReader, ServiceLease, redis_leases
from antefix.discovery.dns_name import KEPT_S
from antefix.discovery.redis_leases import LEASE_TTL_S
from antefix.errors import ConfigError, Unavailable
from antefix.events.event_seal import EventKeys
from antefix.redis_access import RedisAccess
from tests.waiting import AT_MOST_S, until

KEYS = EventKeys({1: bytes(32)}, generation=1)
HASH = "antefix:services:{kvstore}"


class Names:
    """A name server that returns the addresses that a test sets."""

    def __init__(self, *addresses):
        self.addresses, self.now, self.fails = list(addresses), 0.0, False

    async def resolve(self, host, port):
        if self.fails:
            raise OSError("no such name")
        return self.addresses

    def name(self):
        return DnsName("dns:stores.rack:7010", resolve=self.resolve, clock=lambda: self.now)


async def test_each_address_of_a_name_is_a_service():
    names = Names("10.0.0.1", "10.0.0.2", "fd00::7")
    found = await names.name().find()
    assert {each.address for each in found} == {"10.0.0.1:7010", "10.0.0.2:7010", "[fd00::7]:7010"}
    assert {each.name for each in found} == {"10.0.0.1", "10.0.0.2", "fd00--7"}


async def test_an_address_that_an_answer_lacks_counts_for_a_while():
    names = Names("10.0.0.1", "10.0.0.2")
    name = names.name()
    await name.find()
    names.addresses = ["10.0.0.2", "10.0.0.3"]
    assert len(await name.find()) == 3
    names.now = KEPT_S + 1
    assert {each.name for each in await name.find()} == {"10.0.0.2", "10.0.0.3"}


async def test_the_systems_resolver_is_asked():
    assert "127.0.0.1:7010" in {each.address for each in await DnsName("dns:localhost:7010").find()}


@pytest.mark.parametrize("text", ["dns:", "dns:host", "dns:host:0", "dns:a/b:1"])
def test_what_is_no_name_is_refused(text):
    with pytest.raises(ConfigError):
        DnsName(text)


async def test_a_source_that_cannot_be_asked_changes_nothing():
    names, told = Names("10.0.0.1"), []
    following = Following([names.name()], told.append)
    await following.look()
    names.fails = True
    await following.look()
    names.fails, names.addresses = False, ["10.0.0.1", "10.0.0.2"]
    await following.look()
    assert [len(known) for known in told] == [1, 2] and following.num_failed == 1


async def test_without_sources_nothing_is_looked_up_and_nothing_fails(caplog):
    """As in a worker that was given no router by name."""
    following = Following([], lambda known: None)
    await following.look()
    following.start()
    for _ in range(5):
        await asyncio.sleep(0)
    await following.close()
    assert caplog.records == []


async def test_of_two_services_with_one_name_the_first_source_counts():
    first, second = Names("10.0.0.1"), Names("10.0.0.1")
    other = DnsName("dns:stores.rack:9999", resolve=second.resolve)
    following = Following([first.name(), other], lambda known: None)
    await following.look()
    assert [each.address for each in following.known] == ["10.0.0.1:7010"]


@pytest.fixture
def at(redis):
    return RedisAccess(url=redis.url)


def lease(at, name="a", address="127.0.0.1:7010", keys=KEYS):
    return ServiceLease(at, role="kvstore", name=name, address=address, keys=keys)


async def finds(reader, names):
    async def are_found():
        return {each.name for each in await reader.find()} == names

    await until(are_found, f"{names} are found")


async def test_a_service_is_found_while_it_says_so_and_not_after_it_left(at):
    reader = LeaseReader(at, role="kvstore", keys=KEYS)
    async with lease(at), lease(at, "b", "127.0.0.1:7011"):
        await finds(reader, {"a", "b"})
        assert Found("b", "127.0.0.1:7011") in await reader.find()
        assert not await LeaseReader(at, role="prefill", keys=KEYS).find()
    assert not await reader.find()
    await reader.close()


async def test_a_service_that_died_is_gone_after_its_lease_and_old_words_bring_it_back_no_more(at):
    now = [0.0]
    reader = LeaseReader(at, role="kvstore", keys=KEYS, clock=lambda: now[0])
    client = at.connect(timeout_s=AT_MOST_S)
    async with lease(at):
        await finds(reader, {"a"})
        old = await client.hget(HASH, "a")
    await client.hset(HASH, "a", old)
    assert len(await reader.find()) == 1
    now[0] = LEASE_TTL_S + 1
    assert not await reader.find()
    # The dead service's field was dropped, and a copy of it that comes back is recognised.
    assert not await client.hgetall(HASH)
    await client.hset(HASH, "a", old)
    assert not await reader.find()
    await client.aclose()
    await reader.close()


async def test_statements_of_others_are_not_believed(at):
    reader, client = LeaseReader(at, role="kvstore", keys=KEYS), at.connect(timeout_s=AT_MOST_S)
    async with lease(at, keys=EventKeys({1: bytes(31) + b"x"}, generation=1)), lease(at, "b"):
        await finds(reader, {"b"})
        good = json.loads(await client.hget(HASH, "b"))
        for name, text in {
            "c": json.dumps(good),
            "d": json.dumps({**good, "n": "d"}),
            "e": json.dumps({**good, "a": "10.0.0.9:1"}),
            "f": "[1]",
            "g": b"\xff",
            "h": json.dumps({**good, "m": 7}),
            "i": "9" * 5000,
        }.items():
            await client.hset(HASH, name, text)
        refused = reader.num_refused
        assert {each.name for each in await reader.find()} == {"b"}
        assert reader.num_refused - refused == 8
    await client.aclose()
    await reader.close()


async def test_leases_go_on_when_redis_comes_back(start_redis, monkeypatch):
    monkeypatch.setattr(redis_leases, "_RENEW_S", 0.02)
    server = start_redis()
    at = RedisAccess(url=server.url)
    reader = LeaseReader(at, role="kvstore", keys=KEYS)
    following = Following([reader], lambda known: None)
    async with lease(at):

        async def looked():
            await following.look()
            return following.known

        await until(looked, "the service is found")
        server.kill()
        await following.look()
        assert following.num_failed and len(following.known) == 1
        server.start()
        # Redis came back empty, so the service registers again.
        await finds(reader, {"a"})
    await following.close()


async def test_a_redis_that_is_away_is_said_as_such():
    reader = LeaseReader(RedisAccess(url="redis://127.0.0.1:1/0"), role="kvstore", keys=KEYS)
    with pytest.raises(Unavailable, match="leases cannot be read"):
        await reader.find()
    await reader.close()
