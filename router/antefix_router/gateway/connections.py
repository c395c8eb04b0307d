"""Limits the connections to the HTTP server: how many there may be, in all and per client address, and how long they
may be inactive.

A connection uses a file descriptor before any byte of it is read, so these limits are checked first:

    too many in all         the connection that was idle longest is closed; if none is idle, the new one is closed
    too many of an address  the same among the connections of that address
    incomplete head         closed after `head_s`
    unread answer           closed after `unread_s` in which the client took no byte of what waits for it
    no request yet          closed after `idle_s`; between requests, uvicorn's keep-alive closes it after the same time
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Final, Protocol

log = logging.getLogger("antefix.gateway")

# File descriptors left for everything else: files of store and ledger, connections to workers and routers.
_SHARE: Final = 0.75
_CONNECTIONS_MAX: Final = 65_536
_ACCEPTED_AT_ONCE: Final = 64
_TELL_EVERY_S: Final = 10.0


def connections_max() -> int:
    """For how many connections this process has file descriptors, after its other needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else max(4, min(_CONNECTIONS_MAX, int(_SHARE * soft)))


def accepted_at_once() -> int:
    """How many connections to accept in a row. A connection that is closed at once still holds its descriptor for a
    moment.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _ACCEPTED_AT_ONCE
    return max(1, min(_ACCEPTED_AT_ONCE, int((1 - _SHARE) * soft) // 4))


class Connection(Protocol):
    """The part of a connection's interface that this module uses."""

    address: str

    def drop(self) -> None:
        """Close it now. Whether the connection is idle, or never began a request."""


class Connections:
    """The connections of one server.  num_refused: closed on arrival.  num_displaced: idle ones closed to make room.
    num_silent: closed because no complete head came in time.  num_unread: closed because the client did not read its
    answer.
    """

    def __init__(
        self,
        *,
        most: int = 0,
        per_address: int = 0,
        head_s: float,
        idle_s: float,
        unread_s: float = 120.0,
        trusts: Callable[[str], bool],
    ) -> None:
        """most, per_address: 0 means as many as the descriptors allow, and half of that number. trusts: whether an
        address is a proxy with many clients behind it.
        """
        self.most = most or connections_max()
        self.per_address = per_address or max(1, self.most // 2)
        self.head_s, self.idle_s, self.unread_s = head_s, idle_s, unread_s
        self.num_refused = self.num_displaced = self.num_silent = self.num_unread = 0
        self._trusts = trusts
        self._by_address: Counter[str] = Counter()
        # Connections between requests or before their first request, idle longest first.
        self._idle: OrderedDict[Connection, None] = OrderedDict()
        self._quiet_until = 0.0

    def __len__(self) -> int:
        return self._by_address.total()

    def enter(self, connection: Connection) -> bool:
        """Enter a new connection. Returns False if there is no room for the connection, which is then not counted."""
        address = connection.address
        if self._is_full(address) and not self._make_room(connection):
            self.num_refused += 1
            self._tell(address)
            return False
        self._by_address[address] += 1
        self._idle[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._by_address[connection.address] -= 1
        if not self._by_address[connection.address]:
            del self._by_address[connection.address]

    def busy(self, connection: Connection) -> None:
        """A request has begun on this connection."""
        self._idle.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        """The request on this connection has ended."""
        self._idle[connection] = None

    def _is_full(self, address: str) -> bool:
        return len(self) >= self.most or self._is_over(address)

    def _is_over(self, address: str) -> bool:
        # A connection on a Unix socket has no address.
        return bool(address) and self._by_address[address] >= self.per_address and not self._trusts(address)

    def _make_room(self, new: Connection) -> bool:
        """Close the connection that has been idle longest; if one address has too many, one of that address."""
        own_only = self._is_over(new.address)
        for idle in self._idle:
            if not own_only or idle.address == new.address:
                self.num_displaced += 1
                self._idle.pop(idle)
                idle.drop()
                return True
        return False

    def _tell(self, address: str) -> None:
        """Log refused connections only now and then. A log line per connection would make a flood of
        connections worse.
        """
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _TELL_EVERY_S
            log.warning(
                "connections are refused: %d connections are open (limit %d), of which %d are from %s (limit "
                "%d); %d connections were refused so far",
                len(self),
                self.most,
                self._by_address[address],
                address or "a socket file",
                self.per_address,
                self.num_refused,
            )


class QuietAccepting:
    """Logs one line where asyncio would log a traceback for each connection that cannot be accepted for lack of
    descriptors.
    """

    def __init__(self) -> None:
        self.num_failed = 0
        self._quiet_until = 0.0

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        before = loop.get_exception_handler()

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            if "socket.accept()" in context.get("message", ""):
                self._failed(context.get("exception"))
            elif before is not None:
                before(loop, context)
            else:
                loop.default_exception_handler(context)

        loop.set_exception_handler(handle)

    def _failed(self, err: BaseException | None) -> None:
        self.num_failed += 1
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _TELL_EVERY_S
            log.error("new connections cannot be accepted (%s); raise the limit of open files", err)
