"""A DNS name that stands for several services, such as a headless Kubernetes service: each address is one of them.

Name servers may return only some of many addresses per answer, and an answer may be late or missing. So a found address
stays known until it has been absent for some time; calls to a service that has really gone stop long before that.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from antefix.discovery.found import Found
from antefix.errors import ConfigError, Unavailable
from antefix.security.listening import parse_address

PREFIX: Final = "dns:"
# An address that no answer has had for so long is gone.
KEPT_S: Final = 30.0
_TIMEOUT_S: Final = 5.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def addresses_of(host: str, port: int) -> Sequence[str]:
    """The IP addresses that the operating system returns for a host name.  Raises:  OSError: none now."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


class DnsName:
    """`dns:HOST:PORT` as a source of services for `Following`. resolve, clock: replaced in tests."""

    # Name servers keep an answer for longer than that.
    every_s = 2.0

    def __init__(
        self, text: str, *, resolve: Resolve = addresses_of, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises:  ConfigError: not of that form."""
        rest = text.removeprefix(PREFIX)
        self._host, self._port = parse_address(rest)
        if not self._host or not self._port:
            raise ConfigError(f"{text!r}: a DNS name of services is given as {PREFIX}HOST:PORT")
        self._resolve = resolve
        self._clock = clock
        self._seen: dict[str, float] = {}

    async def find(self) -> frozenset[Found]:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                addresses = await self._resolve(self._host, self._port)
        except (OSError, TimeoutError) as err:
            raise Unavailable(f"no address is known for the host name {self._host} now: {err or 'no answer'}") from err
        now = self._clock()
        self._seen.update(dict.fromkeys(addresses, now))
        self._seen = {address: at for address, at in self._seen.items() if now - at <= KEPT_S}
        return frozenset(self._found(address) for address in self._seen)

    async def close(self) -> None:
        """Between two look-ups no connection to a name server stays open."""

    def _found(self, address: str) -> Found:
        host = f"[{address}]" if ":" in address else address
        # Colons of IPv6 are no part of names.
        return Found(name=address.replace(":", "-").strip("-").lower(), address=f"{host}:{self._port}")
