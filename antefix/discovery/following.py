"""Follows which services the sources find, and calls back when the set of services changes. A source that cannot be
asked changes nothing in the set of known services.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

from antefix.discovery.found import Found, Source
from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError
from antefix.keep_running import keep_running

log = logging.getLogger("antefix.discovery")


class Following:
    """changed: called with all known services whenever the set differs from the last one.

    identity: a function that tells whether two services are the same, by default by their names. If two found services
    have the same identity, the one from the source that was named first counts; within one source, the one whose
    address sorts first.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        changed: Callable[[frozenset[Found]], object],
        *,
        identity: Callable[[Found], str] = attrgetter("name"),
    ) -> None:
        self._identity = identity
        self._sources = sources
        self._changed = changed
        self._found: list[frozenset[Found]] = [frozenset()] * len(sources)
        self._is_silent = [False] * len(sources)
        self._known: frozenset[Found] = frozenset()
        self._task: asyncio.Task[None] | None = None
        # Looks that failed, since the start.
        self.num_failed = 0

    @property
    def known(self) -> frozenset[Found]:
        return self._known

    async def look(self) -> None:
        """Ask all sources of services once, and report what has changed."""
        await self._look(range(len(self._sources)))

    async def _look(self, numbers: Iterable[int]) -> None:
        await asyncio.gather(*(self._ask(number) for number in numbers))
        by_identity: dict[str, Found] = {}
        for found in self._found:
            for each in sorted(found):
                by_identity.setdefault(self._identity(each), each)
        known = frozenset(by_identity.values())
        if known != self._known:
            log.info(
                "services found: %s", ", ".join(f"{each.name} at {each.address}" for each in sorted(known)) or "none"
            )
            self._known = known
            self._changed(known)

    def start(self) -> None:
        """Start to repeat the look-up. Needs a running event loop. Without sources there is nothing to repeat."""
        if self._task is None and self._sources:
            self._task = keep_running(self._run, "the look-up of services")

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        await asyncio.gather(*(source.close() for source in self._sources))

    async def _run(self) -> None:
        due_s = [time.monotonic()] * len(self._sources)
        while True:
            now = time.monotonic()
            due = [number for number, at in enumerate(due_s) if at <= now]
            await self._look(due)
            for number in due:
                due_s[number] = now + self._sources[number].every_s
            await asyncio.sleep(max(0.0, min(due_s) - time.monotonic()))

    async def _ask(self, number: int) -> None:
        try:
            self._found[number] = await self._sources[number].find()
            self._is_silent[number] = False
        except AntefixError as err:
            self.num_failed += 1
            if not self._is_silent[number]:
                log.warning(
                    "services cannot be looked up now; the services that are already known stay in use: %s", err
                )
            self._is_silent[number] = True
