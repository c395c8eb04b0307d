"""Stores come, go and move while they are used: which are read, which is written to, and which are never called."""

import pytest

from antefix.discovery import Found
from antefix.errors import ConfigError, Unavailable
from antefix.events.event_seal import EventKeys
from antefix.redis_access import RedisAccess
from antefix.store.found_stores import FoundStores
from antefix.store.open_store import StoresConfig, check_stores, open_stores, store_addresses, store_sources
from antefix.store.store_members import Member
from antefix.store.tier import Tier
from antefix.tier_kind import TierKind
from tests.kvstore.small_store import FINGERPRINT
from tests.store.many_embedded import PROMPT, rack_of

KEYS = EventKeys({1: bytes(32)}, generation=1)


class Fleet:
    """A source of stores that returns the addresses that a test sets."""

    def __init__(self, *names):
        self.found = self.of(*names)

    @staticmethod
    def of(*names):
        return frozenset(Found(name, f"127.0.0.1:{7000 + ord(name[0])}") for name in names)

    async def find(self):
        if self.found is None:
            raise Unavailable("the name server sleeps")
        return self.found

    async def close(self):
        pass


def stores_of(rack, fleet, named=(), **options):
    def member(found):
        store = rack.stores[found.name]
        return Member(tier=Tier(found.name, TierKind.PEER, store), store=store, address=found.address)

    return FoundStores(named, [fleet], make_member=member, home_of="host-1", **options)


async def look(stores):
    await stores._following.look()
    return {member.tier.name for member in stores.members.stores}, {m.tier.name for m in stores.members.near}


async def num_found(stores):
    return (await stores.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks


async def test_stores_are_read_from_when_they_come_until_they_go(tmp_path):
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 10)
        await rack.fill("b", 10, 20)
        fleet = Fleet()
        stores = stores_of(rack, fleet)
        assert await look(stores) == (set(), set())
        with pytest.raises(Unavailable):
            await num_found(stores)
        fleet.found = Fleet.of("a")
        await look(stores)
        assert await num_found(stores) == 10
        kept = stores.members.stores[0]
        fleet.found = Fleet.of("a", "b")
        await look(stores)
        # A store that stays keeps its connection and its measured speed.
        assert await num_found(stores) == 20 and kept in stores.members.stores
        fleet.found = None
        await look(stores)
        assert await num_found(stores) == 20
        fleet.found = Fleet.of("a")
        await look(stores)
        assert await num_found(stores) == 10


async def test_one_of_the_found_is_this_hosts_and_stays_so(tmp_path):
    async with rack_of(tmp_path) as rack:
        fleet = Fleet("a", "b", "c")
        stores = stores_of(rack, fleet)
        _, (home,) = await look(stores)
        assert (await stores.put([PROMPT.block(0)])).num_stored == 1 and rack.held_here(home)
        for other in set("abc") - {home}:
            fleet.found = Fleet.of(home, other)
            assert (await look(stores))[1] == {home}
        homes = {min("abc", key=FoundStores([], [], make_member=None, home_of=f"h{n}")._distance) for n in range(40)}
        assert homes == set("abc")


async def test_named_stores_count_before_found_ones(tmp_path):
    async with rack_of(tmp_path) as rack:
        own = Member(tier=Tier("a", TierKind.DISK, rack.stores["a"]), store=rack.stores["a"], near=True)
        stores = stores_of(rack, Fleet("a", "b"), named=[own])
        assert await look(stores) == ({"a", "b"}, {"a"})
        assert own in stores.members.stores
        by_name = stores_of(rack, Fleet("a", "b"), near=["b"])
        assert (await look(by_name))[1] == {"b"}


async def test_an_address_that_must_not_be_called_is_not(tmp_path, caplog):
    def refuse(address):
        if address.endswith("7097"):
            raise ConfigError("it is on another host, which is called with TLS only")

    async with rack_of(tmp_path) as rack:
        stores = stores_of(rack, Fleet("a", "b"), may_call=refuse)
        assert (await look(stores))[0] == {"b"}
        await look(stores)
        assert caplog.text.count("is not used") == 1


def test_settings_that_find_stores():
    config = StoresConfig(
        stores=("a=h:1@/data/a", "dns:stores.rack:7010", "redis://127.0.0.1:6379/0"), near_stores=("x",)
    )
    check_stores(config)
    assert [each.name for each in store_addresses(config)] == ["a"]
    for text, told in [
        ("dns:stores", "host:port"),
        ("redis://h:1/0", "unencrypted"),
        ("redis://u:p@127.0.0.1/0", "password"),
    ]:
        with pytest.raises(ConfigError, match=told):
            check_stores(StoresConfig(stores=("a=h:1", text)))


async def test_sources_are_made_of_the_settings():
    class Config(StoresConfig):
        redis_password_file = redis_ca_file = ""

    config = Config(stores=("dns:localhost:7010", "redis://127.0.0.1:1/0"))
    sources = store_sources(config, KEYS)
    assert [type(source).__name__ for source in sources] == ["DnsName", "LeaseReader"]
    stores = open_stores(store_addresses(config), sources=sources[:1])
    await stores.start()
    names = {member.tier.name for member in stores.members.stores}
    assert "127.0.0.1" in names and len(stores.members.near) == 1
    assert RedisAccess(url=config.stores[1])
    await stores.close()
    await sources[1].close()
