"""How settings name stores, and the errors of malformed or contradictory settings."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from antefix.errors import ConfigError
from antefix.store.local_store import LocalStore
from antefix.store.many_stores import ManyStores
from antefix.store.open_store import StoreAddress, check_stores, open_stores, store_addresses
from antefix.store.remote_store import RemoteStore
from antefix.tier_kind import TierKind


@dataclass
class Settings:
    store_address: str = ""
    store_dir: str = ""
    stores: tuple[str, ...] = ()
    near_stores: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "address", "directory"),
    [
        ("a=host:7010", "host:7010", ""),
        ("rack-2.b=[::1]:7010@/data/b", "[::1]:7010", "/data/b"),
        ("a=unix:/run/a.sock@/data/x@y", "unix:/run/a.sock", "/data/x@y"),
    ],
)
def test_a_store_is_named_with_its_address_and_its_directory_on_this_host(
    text: str, address: str, directory: str
) -> None:
    where = StoreAddress.parse(text)
    assert (where.name, where.address, where.directory) == (text.split("=")[0], address, directory)


@pytest.mark.parametrize("text", ["", "host:7010", "=host:7010", "A=host:7010", "a b=host:1", "a=", "a=@/data/a"])
def test_a_store_that_is_not_named_so_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=ADDRESS"):
        StoreAddress.parse(text)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Settings(), "--store-address is needed"),
        (Settings(store_address="h:1", stores=("a=h:1",)), "not both"),
        (Settings(stores=("a=h:1", "b=h:2"), store_dir="/data"), "@DIRECTORY"),
        (Settings(stores=("a=h:1", "a=h:2")), "name of its own"),
        (Settings(stores=("a=h:1", "b=h:2"), near_stores=("c",)), "c is not a name in --stores"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Settings, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_stores(settings)


async def test_those_with_a_directory_are_written_to_and_one_store_stays_as_it_was() -> None:
    single = open_stores(store_addresses(Settings(store_address="h:1", store_dir="/data/a")))
    assert isinstance(single, LocalStore)
    assert isinstance(open_stores(store_addresses(Settings(stores=("a=h:1",)))), RemoteStore)
    many = open_stores(store_addresses(Settings(stores=("a=h:1", "b=h:2@/data/b", "c=h:3@/data/c"))))
    assert isinstance(many, ManyStores)
    assert [(member.tier.name, member.near) for member in many.members.stores] == [
        ("b", True),
        ("c", True),
        ("a", False),
    ]
    files = [TierKind.PAGE_CACHE, TierKind.PAGE_CACHE]
    assert [tier.kind for tier in many.tiers] == [TierKind.DISK, TierKind.DISK, TierKind.PEER, *files]
    named = open_stores(store_addresses(Settings(stores=("a=h:1", "b=h:2"))), near=("b",))
    assert isinstance(named, ManyStores)
    assert [member.tier.name for member in named.members.near] == ["b"]
    for store in (single, many, named):
        await store.close()
