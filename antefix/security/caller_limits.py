"""Limits the running calls and connections of one address on a port, so that no address can use up the whole port.

Services of the deployment and front ends are exempt: each serves many callers, and counts them itself. gRPC reports a
connection only with its calls. `idle_connections` counts and closes connections without calls.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import unquote

from antefix.errors import Overloaded
from antefix.security.identity import Identity, Role
from antefix.whole_number import whole_number

# Twice the limit of one connection. Clients send all their calls over one connection.
CALLS_MAX: Final = 2048
CONNECTIONS_MAX: Final = 256
# Where connections cannot be listed, their names are forgotten at this number.
_NUM_KNOWN_MAX: Final = 1 << 16
# Address and port of a connection's other end.
Peer = tuple[str, int]
_FOR_MANY: Final = frozenset({Role.ROUTER, Role.PREFILL, Role.DECODE, Role.KVSTORE, Role.FRONTEND, Role.OPERATOR})


def peer_of(name: str) -> Peer | None:
    """Address and port of a gRPC peer name, such as "ipv4:1.2.3.4:5678", "ipv6:[::1]:5678" or "ipv6:%5B::1%5D:5678";
    None: a socket file.
    """
    kind, _, rest = name.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    number = whole_number(port)
    return None if number is None or kind not in ("ipv4", "ipv6") else (plain_address(host.strip("[]")), number)


def plain_address(host: str) -> str:
    """The address in one form: an IPv4 address written as IPv6 becomes plain IPv4."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.partition("%")[0])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return str(mapped or address)
    return host


class CallerLimits:
    """The limits of one server. The limits are not thread-safe, because only the server's event loop uses them."""

    def __init__(self, calls_max: int = CALLS_MAX, connections_max: int = CONNECTIONS_MAX) -> None:
        self.calls_max, self.connections_max = calls_max, connections_max
        # Running calls by address.
        self._calls: Counter[str] = Counter()
        self._on: dict[str, Counter[str]] = {}
        # For each connection: how many calls run, whether it ever had a call, and whether a service uses it.
        self._running: Counter[Peer] = Counter()
        self._known: dict[Peer, bool] = {}

    @contextlib.contextmanager
    def taken(self, peer: str, identity: Identity) -> Iterator[None]:
        """A context that counts a running call.  peer: gRPC's peer name, such as "ipv4:1.2.3.4:5678" or "unix:...".

        Raises:  Overloaded: the caller's address has reached its limit.
        """
        of_service = identity.role in _FOR_MANY
        with self._connected(peer, of_service=of_service):
            if of_service:
                yield
                return
            with self._counted(peer):
                yield

    @contextlib.contextmanager
    def _connected(self, peer: str, *, of_service: bool) -> Iterator[None]:
        if (end := peer_of(peer)) is None:
            yield
            return
        if len(self._known) >= _NUM_KNOWN_MAX:
            self.keep(set(self._running))
        self._known[end] = of_service or self._known.get(end, False)
        self._running[end] += 1
        try:
            yield
        finally:
            self._running[end] -= 1
            if not self._running[end]:
                del self._running[end]

    def is_of_service(self, end: Peer) -> bool:
        """Whether a service of the deployment has called over this connection."""
        return self._known.get(end, False)

    def has_calls(self, end: Peer) -> bool:
        return end in self._running

    def had_calls(self, end: Peer) -> bool:
        return end in self._known

    def keep(self, ends: set[Peer]) -> None:
        """Forget all other connections, because they are closed."""
        self._known = {end: known for end, known in self._known.items() if end in ends or end in self._running}

    @contextlib.contextmanager
    def _counted(self, peer: str) -> Iterator[None]:
        address = peer.rpartition(":")[0] if peer.startswith("ip") else peer
        self._check(address, peer)
        on = self._on.setdefault(address, Counter())
        self._calls[address] += 1
        on[peer] += 1
        try:
            yield
        finally:
            self._calls[address] -= 1
            on[peer] -= 1
            if not on[peer]:
                del on[peer]
            if not self._calls[address]:
                del self._calls[address], self._on[address]

    def _check(self, address: str, peer: str) -> None:
        if self._calls[address] >= self.calls_max:
            raise Overloaded(f"{self._calls[address]} calls from your address are already running", retry_after_s=1.0)
        on: Mapping[str, int] = self._on.get(address, {})
        if peer not in on and len(on) >= self.connections_max:
            raise Overloaded(
                f"calls from your address already use {len(on)} connections: send more of them over one connection",
                retry_after_s=1.0,
            )
