"""Several stores that come, go and move: those named in the settings, and those found through DNS or Redis.

A store named in the settings takes precedence over a found store of the same name. A store is read as soon as it is
found. After a call to a store has failed, the store is not asked for a moment (`Tier.failed`). When a store's lease or
address has expired, it is forgotten.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from antefix.discovery import Following, Found, Source
from antefix.discovery.found import SERVICE_NAME
from antefix.errors import ConfigError
from antefix.store.many_stores import ManyStores
from antefix.store.store_members import Member

log = logging.getLogger("antefix.store")


class FoundStores(ManyStores):
    """The object is used from one event loop; `start` looks for stores, and keeps looking from then on."""

    def __init__(
        self,
        named: Sequence[Member],
        sources: Sequence[Source],
        *,
        make_member: Callable[[Found], Member],
        near: Sequence[str] = (),
        may_call: Callable[[str], object] = lambda address: None,
        home_of: str = "",
        **options: Any,
    ) -> None:
        """near: names of the stores that this host writes to. If none is named, the stores with a directory are near.
        If no store has a directory, each host writes to one store, chosen by `home_of` (this host's name), so that
        hosts spread their writes over all stores.

        may_call: raises ConfigError for an address that must not be called. options: the further arguments of
        `ManyStores`.
        """
        super().__init__(named, **options)
        self._named = tuple(named)
        self._near = frozenset(near)
        self._home_of = home_of or socket.gethostname()
        self._make_member = make_member
        self._may_call = may_call
        self._by_found: dict[Found, Member] = {}
        self._refused: set[Found] = set()
        self._following: Final = Following(sources, self._changed)

    async def start(self) -> None:
        """Look for stores once, keep following them, and do what `ManyStores.start` does."""
        await asyncio.gather(self._following.look(), super().start())
        self._following.start()

    async def close(self) -> None:
        await self._following.close()
        await super().close()

    def _changed(self, found: frozenset[Found]) -> None:
        names = {member.tier.name for member in self._named}
        wanted = [each for each in sorted(found) if each.name not in names and self._is_usable(each)]
        self._by_found = {each: self._by_found.get(each) or self._make_member(each) for each in wanted}
        members = [*self._named, *self._by_found.values()]
        near = self._near or {member.tier.name for member in self._named if member.near} or self._home(members)
        for member in members:
            member.near = member.tier.name in near
        self.change(sorted(members, key=lambda member: not member.near))

    def _is_usable(self, found: Found) -> bool:
        if found in self._refused:
            return False
        try:
            if not SERVICE_NAME.fullmatch(found.name):
                raise ConfigError("the service's name is not a valid name of a store")
            self._may_call(found.address)
        except ConfigError as err:
            log.warning("the store named %s at %s is not used: %s", found.name, found.address, err)
            self._refused.add(found)
            return False
        return True

    def _home(self, members: Sequence[Member]) -> set[str]:
        """This host's store by rendezvous hashing: when a store comes or goes, few hosts change the store they write
        to.
        """
        names = [member.tier.name for member in members]
        return {min(names, key=self._distance)} if names else set()

    def _distance(self, name: str) -> bytes:
        return hashlib.blake2b(f"{self._home_of}\0{name}".encode(), digest_size=8).digest()
