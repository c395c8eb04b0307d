"""Closes idle connections of an address that has more of a gRPC port than it may, so that the others have theirs.

gRPC tells of a connection only with its calls: one that makes none is seen here alone, among the process' own
descriptors. What is closed are connections without a call, those that never had one first; what services hold, who
carry many callers, is never closed and does not count. Only Linux shows its descriptors; elsewhere a port still takes
so many in all, and each is closed after two minutes (`antefix.rpc`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from antefix.security.caller_limits import CallerLimits, Peer, plain_address

# Within that time an address may hold more; each look at the descriptors takes some microseconds per descriptor.
LOOK_S: Final = 1.0
_DESCRIPTORS: Final = Path("/proc/self/fd")


@dataclass(frozen=True, slots=True)
class Connection:
    """One that this process has accepted. peer: its address and port."""

    descriptor: int
    peer: Peer


def accepted(port: int) -> list[Connection]:
    """All connections to this port of ours, oldest descriptor first."""
    found = []
    for descriptor in sorted(_descriptors()):
        with contextlib.suppress(OSError), _socket_of(descriptor) as end:
            if end.family in (socket.AF_INET, socket.AF_INET6) and end.getsockname()[1] == port:
                host, peer_port, *_ = end.getpeername()
                found.append(Connection(descriptor, (plain_address(host), peer_port)))
    return found


def _descriptors() -> list[int]:
    """Of this process; none where the system does not show them."""
    try:
        return [int(path.name) for path in _DESCRIPTORS.iterdir()]
    except OSError:
        return []


def close(connection: Connection) -> bool:
    """End it for both sides; gRPC, whose descriptor it is, finds that it has ended. False: it was gone."""
    with contextlib.suppress(OSError), _socket_of(connection.descriptor) as end:
        host, port, *_ = end.getpeername()
        # The descriptor may be another connection's by now.
        if (plain_address(host), port) == connection.peer:
            end.shutdown(socket.SHUT_RDWR)
            return True
    return False


def _socket_of(descriptor: int) -> socket.socket:
    """A second descriptor of the same socket, which stays that one's whatever becomes of the first.

    Raises:  OSError: it is none.
    """
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError("no socket")
    return socket.socket(fileno=os.dup(descriptor))


def to_close(connections: list[Connection], limits: CallerLimits) -> list[Connection]:
    """Of each address what is too much, of those that have no call."""
    by_address: dict[str, list[Connection]] = defaultdict(list)
    for each in connections:
        if not limits.is_of_service(each.peer):
            by_address[each.peer[0]].append(each)
    found = []
    for held in by_address.values():
        idle = [each for each in held if not limits.has_calls(each.peer)]
        idle.sort(key=lambda each: limits.had_calls(each.peer))
        found += idle[: max(0, len(held) - limits.connections_max)]
    return found


async def watch_connections(port: int, limits: CallerLimits, note: Callable[[int], None]) -> None:
    """Until it is cancelled. note: is told how many were closed."""
    while numbers := _descriptors():
        await asyncio.sleep(LOOK_S)
        if len(numbers) <= limits.connections_max:
            continue
        connections = accepted(port)
        limits.keep({each.peer for each in connections})
        if num_closed := sum(map(close, to_close(connections, limits))):
            note(num_closed)
