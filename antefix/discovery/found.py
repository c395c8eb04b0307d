"""What is found: a service's name and address. And what finds it."""

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
    """Where services are looked for.  every_s: how often it is worth asking."""

    every_s: float

    async def find(self) -> frozenset[Found]:
        """Those that are there now.

        Raises:  Unavailable: it cannot be asked now. What was found before counts on.
        """

    async def close(self) -> None:
        """Let go of connections."""
