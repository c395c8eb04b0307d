"""Closes idle connections of an address that exceeds its share of a gRPC port, so that other addresses can connect.

gRPC reports a connection only with the calls on it. So idle connections are found here among the file descriptors of
the process. Only connections without a running call are closed, beginning with those that never had a call. Connections
of other services of the deployment serve many callers, so they are never closed and do not count. Only Linux lists the
descriptors of a process. On other systems a port still has a total limit, and idle connections are closed after two
minutes (`antefix.rpc`).
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

# The time between two checks, in which an address may exceed its limit. A check takes some microseconds per descriptor.
LOOK_S: Final = 1.0
_DESCRIPTORS: Final = Path("/proc/self/fd")


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection that this process has accepted. peer: address and port of the connection's other end."""

    descriptor: int
    peer: Peer


def accepted(port: int) -> list[Connection]:
    """All connections to this process's port, oldest descriptor first."""
    found = []
    for descriptor in sorted(_descriptors()):
        with contextlib.suppress(OSError), _socket_of(descriptor) as end:
            if end.family in (socket.AF_INET, socket.AF_INET6) and end.getsockname()[1] == port:
                host, peer_port, *_ = end.getpeername()
                found.append(Connection(descriptor, (plain_address(host), peer_port)))
    return found


def _descriptors() -> list[int]:
    """The descriptors of this process; empty where the system does not list them."""
    try:
        return [int(path.name) for path in _DESCRIPTORS.iterdir()]
    except OSError:
        return []


def close(connection: Connection) -> bool:
    """Shut a connection down in both directions; gRPC, which owns the descriptor, notices. False: it was closed
    already.
    """
    with contextlib.suppress(OSError), _socket_of(connection.descriptor) as end:
        host, port, *_ = end.getpeername()
        # The descriptor may belong to another connection by now.
        if (plain_address(host), port) == connection.peer:
            end.shutdown(socket.SHUT_RDWR)
            return True
    return False


def _socket_of(descriptor: int) -> socket.socket:
    """A duplicate of the descriptor, which keeps the same socket even if the first descriptor is closed and reused.

    Raises:  OSError: it is not a socket.
    """
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError("no socket")
    return socket.socket(fileno=os.dup(descriptor))


def to_close(connections: list[Connection], limits: CallerLimits) -> list[Connection]:
    """The connections to close: for each address above its limit, as many connections without calls as exceed the
    limit.
    """
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
    """Close excess idle connections until this task is cancelled. note: called with the number of closed
    connections.
    """
    while _DESCRIPTORS.is_dir():
        # Empty also while the process has no descriptor left to list them with, which ends with some connections.
        numbers = _descriptors()
        await asyncio.sleep(LOOK_S)
        if len(numbers) <= limits.connections_max:
            continue
        connections = accepted(port)
        limits.keep({each.peer for each in connections})
        if num_closed := sum(map(close, to_close(connections, limits))):
            note(num_closed)
