"""How many names all feeds of one process may hold together: what a router knows of its stores takes no more memory."""

from __future__ import annotations

from typing import Final, Protocol

# Of a key in a set: 73 to 141 were measured at all fillings of sets of up to 2 million keys.
BYTES_PER_NAME: Final = 144
BYTES_MAX: Final = 1 << 30


class Tenant(Protocol):
    """What shares the room."""

    def trim(self) -> None:
        """Hold no more than `FeedRoom.share` from now on."""


class FeedRoom:
    """Shared in equal parts by the feeds that are there. Used from one event loop."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._num_max = max(1, bytes_max // BYTES_PER_NAME)
        self._tenants: list[Tenant] = []

    @property
    def share(self) -> int:
        """Names that one of them may hold."""
        return self._num_max // max(1, len(self._tenants))

    def join(self, tenant: Tenant) -> None:
        self._tenants.append(tenant)
        for each in self._tenants:
            each.trim()

    def leave(self, tenant: Tenant) -> None:
        if tenant in self._tenants:
            self._tenants.remove(tenant)
