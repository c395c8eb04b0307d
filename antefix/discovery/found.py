"""A found service (name and address), and the interface of the sources that find services."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Protocol

# Of a store: it stands in receipts, metrics and file names.
SERVICE_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """name: what the service calls itself; a DNS name's addresses have no names, so theirs are their addresses' hosts.

    address: host:port at which it is called.
    """

    name: str
    address: str


class Source(Protocol):
    """A place where services are looked up.  every_s: how often to ask it, in seconds."""

    every_s: float

    async def find(self) -> frozenset[Found]:
        """The services that exist now.

        Raises:  Unavailable: the source does not answer now; services found before stay valid.
        """

    async def close(self) -> None:
        """Let go of connections."""
