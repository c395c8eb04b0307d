"""Deletes a tenant's records from all stores, window pools and the object store, in an order that leaves nothing
behind.

Stores come first and the object store last, because a store that still has records may upload them. Records that were
being uploaded are found by repeating the purge until a round finds nothing. A store that does not answer does not delay
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from antefix.discovery import DnsName, LeaseReader, Source
from antefix.discovery.dns_name import PREFIX as DNS_PREFIX
from antefix.errors import AntefixError, ConfigError
from antefix.events.event_seal import EventKeys
from antefix.objects.bucket import is_object_url
from antefix.redis_access import SCHEMES, RedisAccess
from antefix.secret import Keyring
from antefix.security.grants import hold
from antefix.security.identity import Role
from antefix.store.open_store import StoreAddress
from antefix.window_pool import RedisWindowPool
from antefix_console.moving import grant_of_owner
from antefix_kvstore.copy_target import open_target

_ROUNDS_MAX: Final = 5
# Makes the access to Redis (password, certificates) for a URL.
Access = Callable[[str], RedisAccess]


def plain_access(url: str) -> RedisAccess:
    return RedisAccess(url=url)


@dataclass(slots=True)
class PurgeReport:
    """purged: number of records deleted, by store. failed: stores that could not be purged, and why."""

    purged: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


async def stores_of(texts: Sequence[str], keyring: Keyring | None, access: Access = plain_access) -> list[str]:
    """The stores that the texts name, each once, object stores last.

    A text may be a directory, an address, an object store's URL, or an entry of --stores: NAME=ADDRESS, or a place
    where stores are found. A Redis URL is kept next to the stores that were found there, because it may also be a
    window pool.

    Raises:  ConfigError: Redis lists stores, and there is no secret to verify the list with.  Unavailable: Redis does
    not
             answer, or names are not resolved now.
    """
    found: dict[str, None] = {}
    for text in texts:
        source = _source(text, keyring, access)
        if source is not None:
            try:
                found |= dict.fromkeys(each.address for each in sorted(await source.find()))
            finally:
                await source.close()
        if source is None or is_redis_url(text):
            found[_plain(text)] = None
    return sorted(found, key=lambda text: (is_object_url(text), is_redis_url(text)))


def is_redis_url(text: str) -> bool:
    return text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


async def purge_all(stores: Sequence[str], owners: Sequence[bytes], access: Access = plain_access) -> PurgeReport:
    """stores: as `stores_of` gives them. Raises: ConfigError: one of the texts does not name a store; the stores before
    it have been purged.
    """
    report = PurgeReport(purged=dict.fromkeys(stores, 0))
    for _ in range(_ROUNDS_MAX):
        before = sum(report.purged.values())
        report.failed.clear()
        for text in stores:
            try:
                report.purged[text] += await _purge(text, owners, access)
            except ConfigError:
                raise
            except AntefixError as err:
                report.failed[text] = str(err)
        if sum(report.purged.values()) == before:
            break
    return report


async def _purge(text: str, owners: Sequence[bytes], access: Access) -> int:
    store = RedisWindowPool(access(text), bytes_max=0) if is_redis_url(text) else open_target(text)
    try:
        purged = 0
        for owner in owners:
            asks_nobody = is_object_url(text) or is_redis_url(text)
            hold(b"" if asks_nobody else grant_of_owner(text, owner))
            purged += await store.purge(owner)
        return purged
    finally:
        await store.close()


def _source(text: str, keyring: Keyring | None, access: Access) -> Source | None:
    if text.startswith(DNS_PREFIX):
        return DnsName(text)
    if not is_redis_url(text):
        return None
    if keyring is None:
        raise ConfigError(f"{text}: --secret-file is needed to check that Redis' list of stores is signed")
    return LeaseReader(access(text), role=Role.KVSTORE, keys=EventKeys.of(keyring))


def _plain(text: str) -> str:
    """The address in NAME=ADDRESS[@DIRECTORY]. A directory's name may contain an equals sign as well."""
    if (
        is_object_url(text)
        or is_redis_url(text)
        or text.startswith((".", "/"))
        or "=" not in text
        or Path(text).exists()
    ):
        return text
    return StoreAddress.parse(text).address
