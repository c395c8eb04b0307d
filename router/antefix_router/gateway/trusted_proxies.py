"""Finds a client's address from the header that trusted proxies set.

Any client can write such headers. So without the setting of trusted proxies, all such headers are ignored. With the
setting, the named header counts only on connections from the named proxies, and only as far back as the chain of these
proxies goes.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from antefix.config import require
from antefix.errors import ConfigError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# A peer on a Unix socket has no address.
UNIX_PEER: Final = "unix"
_HEADER: Final = re.compile(r"[a-z0-9-]{1,64}")
_FORWARDED: Final = "forwarded"
# The most proxies in a row. A longer list was made up by a client.
_NUM_HOPS_MAX: Final = 16
_FOR: Final = re.compile(r'(?:^|;)\s*for="?([^";]*)"?', re.IGNORECASE)


class TrustedProxies:
    """Raises:  ConfigError: only one of the two settings is given, or a value is not a network or not a header."""

    def __init__(self, proxies: Sequence[str], header: str) -> None:
        require(
            bool(proxies) == bool(header),
            "--http-trusted-proxies and --http-client-header are given together: who is believed, and in which header",
        )
        self.header = header.lower()
        require(
            not header or _HEADER.fullmatch(self.header) is not None, f"http_client_header is no header: {header!r}"
        )
        self._unix = UNIX_PEER in proxies
        self._networks = [_network(proxy) for proxy in proxies if proxy != UNIX_PEER]

    def client(self, peer: str, headers: Headers) -> str:
        """The client's address: the last address in the header that is not a trusted proxy's, or else the peer's."""
        if not self.header or not self.trusts(peer):
            return peer
        lines = headers.getlist(self.header)
        hops = [hop.strip() for hop in ",".join(lines).split(",")][-_NUM_HOPS_MAX:]
        client = peer
        for hop in reversed(hops):
            address = _address(hop, is_forwarded=self.header == _FORWARDED)
            if address is None:
                break
            client = address
            if not self.trusts(client):
                break
        return client

    def trusts(self, peer: str) -> bool:
        """Whether the other end of the connection is one of the proxies."""
        if not peer:
            return self._unix
        try:
            address = ipaddress.ip_address(peer.partition("%")[0])
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)


class ClientAddress:
    """ASGI middleware: sets `client` in a request's scope to the client's address, as far as it can be known."""

    def __init__(self, app: ASGIApp, proxies: TrustedProxies) -> None:
        self._app = app
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            peer = scope.get("client") or ("", 0)
            client = self._proxies.client(peer[0], Headers(scope=scope))
            scope["client"] = (client, peer[1] if client == peer[0] else 0)
        await self._app(scope, receive, send)


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as err:
        raise ConfigError(f"http_trusted_proxies must be addresses, networks or {UNIX_PEER}: {err}") from err


def _address(hop: str, *, is_forwarded: bool) -> str | None:
    """The address of a hop. None: the entry names no address, so that the entries before it cannot be trusted
    either.
    """
    if is_forwarded:
        found = _FOR.search(hop)
        hop = found[1] if found else ""
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    try:
        return str(ipaddress.ip_address(hop))
    except ValueError:
        return None
