"""The entries in a list of addresses that stand for services to be looked up: `dns:HOST:PORT`, or a redis:// URL of
leases.
"""

from __future__ import annotations

from collections.abc import Iterable

from antefix.discovery.dns_name import PREFIX, DnsName, Resolve, addresses_of
from antefix.discovery.found import Source
from antefix.discovery.redis_leases import LeaseReader
from antefix.events.event_seal import EventKeys
from antefix.redis_access import SCHEMES, RedisAccess, RedisConfig, check_redis_url
from antefix.security.identity import Role

_LEASES = tuple(f"{scheme}://" for scheme in SCHEMES)


def is_finder(text: str) -> bool:
    return text.startswith((PREFIX, *_LEASES))


def without_finders(texts: Iterable[str]) -> tuple[str, ...]:
    """The plain addresses in the list, each address once."""
    return tuple(dict.fromkeys(text for text in texts if not is_finder(text)))


def called_names(texts: Iterable[str]) -> tuple[str, ...]:
    """host:port of all services that are named in the list by address or by DNS name. Services that are found by leases
    in Redis are not known at this point.
    """
    return tuple(text.removeprefix(PREFIX) for text in texts if not text.startswith(_LEASES))


def check_finders(texts: Iterable[str], setting: str) -> None:
    """Raises:  ConfigError: one is malformed, or a URL of Redis that may not be used."""
    for text in texts:
        if text.startswith(PREFIX):
            DnsName(text)
        elif text.startswith(_LEASES):
            check_redis_url(text, setting)


def finders(
    texts: Iterable[str], config: RedisConfig, *, role: Role, keys: EventKeys, resolve: Resolve = addresses_of
) -> list[Source]:
    """The object that finds the services of a setting. role: the role of these services. keys: the keys that sign their
    leases.
    """
    return [
        DnsName(text, resolve=resolve)
        if text.startswith(PREFIX)
        else LeaseReader(RedisAccess.of(text, config), role=role, keys=keys)
        for text in dict.fromkeys(texts)
        if is_finder(text)
    ]
