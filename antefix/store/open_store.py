"""Opens one store or several: reads go to the files if these are on this host, and otherwise over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from antefix.config import require, setting
from antefix.discovery import Source
from antefix.discovery.finders import check_finders, finders, is_finder
from antefix.discovery.found import SERVICE_NAME
from antefix.errors import ConfigError
from antefix.events.event_seal import EventKeys
from antefix.redis_access import RedisAccess, RedisConfig
from antefix.security.identity import Role
from antefix.store.feed_room import FeedRoom
from antefix.store.found_stores import FoundStores
from antefix.store.local_copies import LocalCopies
from antefix.store.local_store import LocalStore
from antefix.store.many_stores import ManyStores
from antefix.store.object_access import check_object_store
from antefix.store.remote_store import RemoteStore
from antefix.store.store_feed import StoreFeed
from antefix.store.store_members import Member
from antefix.store.tier import Tier
from antefix.store_files.seal import Seals
from antefix.tier_kind import TierKind

# The name of a single unnamed store that is used together with an object tier.
_ONLY: Final = "store"
_DAYS_3_S: Final = 72 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """The address where the kvstore service listens, and its directory if that is on this host ("" if not).

    name: the store's name in receipts and metrics, where there are several stores.
    """

    address: str
    directory: str = ""
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> StoreAddress:
        """Raises:  ConfigError: not of the form NAME=ADDRESS or NAME=ADDRESS@DIRECTORY."""
        name, equals, rest = text.partition("=")
        address, at, path = rest.partition("@/")
        if not equals or not address or not SERVICE_NAME.fullmatch(name):
            raise ConfigError(
                f"a store is given as NAME=ADDRESS, or NAME=ADDRESS@DIRECTORY on its own host, not as {text!r};"
                " a name has lower-case letters, digits, dots and dashes"
            )
        return cls(address=address, directory=f"/{path}" if at else "", name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoresConfig:
    """Settings of a process that reads stores. Other configurations copy these settings with `same_setting`."""

    store_address: str = setting("", "host:port of the kvstore service")
    store_dir: str = setting(
        "", "the store's directory, if the store is on this host; payloads are then read from its files, without a call"
    )
    stores: tuple[str, ...] = setting(
        (),
        "several stores, as NAME=ADDRESS or, on this host, NAME=ADDRESS@DIRECTORY, separated by commas; instead of"
        " store_address and store_dir. dns:HOST:PORT stands for a store at each address of that name. A redis:// URL"
        " stands for all stores that have a lease there (their --lease-redis)",
    )
    near_stores: tuple[str, ...] = setting(
        (),
        "names of the stores that records are written to; empty: those with a directory, or else the first; of"
        " stores found by DNS or Redis, one per host",
    )
    local_copies_bytes: int = setting(
        4 << 30,
        "most bytes that may be copied within local_copies_ttl_s from other hosts' stores to this host's; a record"
        " is copied when it is read for the third time; 0: none",
        unit="bytes",
    )
    local_copies_ttl_s: float = setting(
        _DAYS_3_S, "how long a read of another host's store counts towards the three that make a copy", unit="s"
    )
    object_store: str = setting(
        "",
        "object store to read as well: s3://BUCKET/PREFIX, gs://, az:// or file:///PATH; empty: none",
    )
    object_encrypt_key_file: str = setting(
        "",
        "file with the key that the object store is encrypted with, the same as at its kvstore services",
        guards=True,
    )
    object_keys_file: str = setting(
        "", "file with tenants' own keys for the object store, the same as at its kvstore services", guards=True
    )


class ReadsStores(Protocol):
    """Settings that name a store, or several."""

    @property
    def store_address(self) -> str: ...
    @property
    def store_dir(self) -> str: ...
    @property
    def stores(self) -> tuple[str, ...]: ...
    @property
    def near_stores(self) -> tuple[str, ...]: ...
    @property
    def object_store(self) -> str: ...


class FindsStores(ReadsStores, RedisConfig, Protocol):
    """The settings of `ReadsStores`, and those for reaching Redis."""


def check_stores(config: ReadsStores) -> None:
    """Raises:  ConfigError: no store is named, or one in two ways, or a name is malformed or given twice."""
    require(
        bool(config.store_address) != bool(config.stores),
        "--store-address is needed: host:port of the kvstore service; or --stores with several, and not both",
    )
    require(
        not (config.stores and config.store_dir),
        "--store-dir cannot be used with --stores: give a store's directory as NAME=ADDRESS@DIRECTORY",
    )
    names = [where.name for where in store_addresses(config)]
    require(
        len(names) == len(set(names)), f"--stores: each store needs a name of its own, but they are {', '.join(names)}"
    )
    unknown = sorted(set(config.near_stores) - set(names))
    is_complete = not any(is_finder(text) for text in config.stores)
    require(not (unknown and is_complete), f"--near-stores: {', '.join(unknown)} is not a name in --stores")
    check_finders(config.stores, "stores")
    check_object_store(config.object_store)


def store_addresses(config: ReadsStores) -> list[StoreAddress]:
    """The stores that the settings name, without stores found through DNS or Redis.

    Raises:  ConfigError: an address is malformed.
    """
    if config.stores:
        return [StoreAddress.parse(text) for text in config.stores if not is_finder(text)]
    return [StoreAddress(address=config.store_address, directory=config.store_dir)]


def store_sources(config: FindsStores, keys: EventKeys) -> list[Source]:
    """The finders of stores (DNS, Redis) that the settings name. keys: verify the signatures of leases in Redis."""
    return finders(config.stores, config, role=Role.KVSTORE, keys=keys)


def open_store(where: StoreAddress | str, *, seals: Seals | None = None) -> LocalStore | RemoteStore:
    """A client of a store service. The client connects when first used, and reconnects after the service came back.

    where: a StoreAddress, or "host:port" alone to reach everything over gRPC.  seals: checks the deployment's seals;
    if given, only sealed records are accepted. Every worker must give it.
    """
    if isinstance(where, str):
        return RemoteStore(where, seals=seals)
    if where.directory:
        return LocalStore(Path(where.directory), where.address, seals=seals)
    return RemoteStore(where.address, seals=seals)


def open_stores(
    where: Sequence[StoreAddress],
    *,
    near: Sequence[str] = (),
    seals: Seals | None = None,
    more: Sequence[Tier] = (),
    copies: LocalCopies | None = None,
    make_feed: Callable[[Member, bytes], StoreFeed] | None = None,
    sources: Sequence[Source] = (),
    may_call: Callable[[str], object] = lambda address: None,
) -> LocalStore | RemoteStore | ManyStores:
    """One client that presents all these stores as one store. For a single store without further arguments, the result
    is the client that `open_store` returns.

    near: names of the stores that are written to; if none is given, those with a directory, or else the first. more,
    copies, make_feed: as for `ManyStores`. sources: finders of further stores; call `ManyStores.start` first. may_call:
    raises ConfigError for the address of a found store that must not be called.
    """
    if len(where) == 1 and not sources and not more:
        return open_store(where[0], seals=seals)
    chosen = list(near) or [each.name for each in where if each.directory]
    if not chosen and not sources:
        chosen = [where[0].name]
    named = [_member(each, seals, near=each.name in chosen) for each in where]
    named.sort(key=lambda member: not member.near)
    if not sources:
        return ManyStores(named, more=more, copies=copies, make_feed=make_feed)
    return FoundStores(
        named,
        sources,
        make_member=lambda found: _member(StoreAddress(address=found.address, name=found.name), seals),
        near=near,
        may_call=may_call,
        more=more,
        copies=copies,
        make_feed=make_feed,
    )


def _member(where: StoreAddress, seals: Seals | None, *, near: bool = False) -> Member:
    store = open_store(where, seals=seals)
    kind = TierKind.DISK if where.directory else TierKind.PEER
    tier = Tier(where.name or _ONLY, kind, store)
    tier.standing.returned_s = lambda: store.breaker.returned_s
    page_cache = tier.in_page_cache() if where.directory else None
    return Member(tier=tier, store=store, address=where.address, near=near, page_cache=page_cache)


def feed_maker(redis: RedisAccess | str, keys: EventKeys, room: FeedRoom) -> Callable[[Member, bytes], StoreFeed]:
    """A function that makes the feed of a store's events: through Redis if `redis` is given, else from the store.

    room: the common limit on the names that all feeds hold together.
    """

    def make(member: Member, fingerprint: bytes) -> StoreFeed:
        watch, name = member.store.watch, member.address
        return StoreFeed(watch, fingerprint=fingerprint, room=room, redis_url=redis, name=name, keys=keys)

    return make


def local_copies(config: Any) -> LocalCopies | None:
    """The copier that `StoresConfig`'s settings ask for; None if they turn copying off.

    Raises:  ConfigError: a setting is negative.
    """
    for name in ("local_copies_bytes", "local_copies_ttl_s"):
        require(getattr(config, name) >= 0, f"{name} must not be negative, is {getattr(config, name)}")
    if not config.local_copies_bytes:
        return None
    return LocalCopies(bytes_max=config.local_copies_bytes, ttl_s=config.local_copies_ttl_s)
