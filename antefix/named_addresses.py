"""All addresses behind a name, as they are now: a service behind one DNS name may have many, which come and go."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from antefix.security.listening import UNIX, bare_host, join_address, parse_address

log = logging.getLogger("antefix.addresses")

# A name server that does not answer must not hold up what is known.
_RESOLVE_TIMEOUT_S: Final = 5.0

Resolve = Callable[[str], Awaitable[tuple[str, ...]]]


async def addresses_of(address: str) -> tuple[str, ...]:
    """Every address that this name:port has now, sorted; the name itself where it has one, or is an address already.

    A name is kept where it can be: certificates are checked for it, and the channel looks it up again by itself.
    Raises:  OSError: the name is not known now, or nobody answers.
    """
    host, port = parse_address(address)
    if host.startswith(UNIX) or _is_address(bare_host(host)):
        return (address,)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # Of a host with IPv4 and IPv6 both are the same host: one family is enough, or it would be called twice.
    family = min(each[0] for each in found)
    hosts = sorted({str(each[4][0]) for each in found if each[0] == family})
    if len(hosts) == 1:
        return (address,)
    return tuple(join_address(f"[{each}]" if ":" in each else each, port) for each in hosts)


class NamedAddresses:
    """What some names stood for when they were last looked up. A name that cannot be looked up keeps what it had."""

    def __init__(self, names: Sequence[str], resolve: Resolve = addresses_of) -> None:
        self._resolve = resolve
        self._known: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
        self._failing: set[str] = set()

    async def look_up(self) -> tuple[str, ...]:
        """All addresses of all names, each once. Names that were never found are called as they are."""
        for name in self._known:
            try:
                self._known[name] = await self._resolve(name)
                self._failing.discard(name)
            except (OSError, TimeoutError) as err:
                if name not in self._failing:
                    log.warning("%s cannot be looked up, what is known of it stays: %s", name, err)
                self._failing.add(name)
        return self.now

    @property
    def now(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each for name, found in self._known.items() for each in found or (name,)))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
