"""How much of a port one address may take, so that nobody takes all of it: calls that run, and connections they are on.

Services of a deployment and front ends are not counted: behind their addresses are many callers, who are counted there.
gRPC tells of a connection only with its calls. One without any is closed after two minutes (`antefix.rpc`), and a port
takes so many in all.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from antefix.errors import Overloaded
from antefix.security.identity import Identity, Role

# Twice what one connection may have: clients put all of their calls on one.
CALLS_MAX: Final = 2048
CONNECTIONS_MAX: Final = 256
_FOR_MANY: Final = frozenset({Role.ROUTER, Role.PREFILL, Role.DECODE, Role.KVSTORE, Role.FRONTEND, Role.OPERATOR})


class CallerLimits:
    """Of one server. Not thread-safe: for its event loop."""

    def __init__(self, calls_max: int = CALLS_MAX, connections_max: int = CONNECTIONS_MAX) -> None:
        self.calls_max, self.connections_max = calls_max, connections_max
        # Calls by address, and by address and port.
        self._calls: Counter[str] = Counter()
        self._on: dict[str, Counter[str]] = {}

    @contextlib.contextmanager
    def taken(self, peer: str, identity: Identity) -> Iterator[None]:
        """Around a call.  peer: as gRPC has it, "ipv4:1.2.3.4:5678", "ipv6:[::1]:5678" or "unix:...".

        Raises:  Overloaded: its address has as much as it may.
        """
        if identity.role in _FOR_MANY:
            yield
            return
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
            raise Overloaded(f"{self._calls[address]} calls from your address run already", retry_after_s=1.0)
        on: Mapping[str, int] = self._on.get(address, {})
        if peer not in on and len(on) >= self.connections_max:
            raise Overloaded(
                f"calls from your address run on {len(on)} connections already: put more of them on one",
                retry_after_s=1.0,
            )
