"""Finds workers by DNS names or by leases in Redis, as an alternative to naming them in settings or letting them
register.

Each found worker is asked for its model and settings before it gets work, and again until it answers. A worker that is
no longer found gets no more work, unless it has also registered and its lease still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from operator import attrgetter

from antefix.clients import DecodeClient, PrefillClient
from antefix.clients.statuses import DecodeStatus, PrefillStatus
from antefix.discovery import Following, Source
from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError, ConfigError, FingerprintMismatch
from antefix.keep_running import keep_running
from antefix_router.placement.leases import Leases
from antefix_router.placement.workers import WorkerRole

log = logging.getLogger("antefix.router")

_ASK_TIMEOUT_S = 2.0
# The interval at which a worker that does not answer yet is asked again.
_RETRY_S = 2.0

Status = PrefillStatus | DecodeStatus
Ask = Callable[[WorkerRole, str], Awaitable[Status]]


async def ask_worker(role: WorkerRole, address: str) -> Status:
    """A worker's status.  Raises:  AntefixError: it does not answer."""
    client = PrefillClient(address) if role is WorkerRole.PREFILL else DecodeClient(address)
    try:
        return await client.status(timeout_s=_ASK_TIMEOUT_S)
    finally:
        await client.close()


class FoundWorkers:
    """After `start`, looks for workers at intervals.

    num_failed, num_refused: counts by role since the start: look-ups that failed, and workers that cannot serve here.
    """

    def __init__(
        self,
        sources: Mapping[WorkerRole, Sequence[Source]],
        leases: Leases,
        *,
        admit: Callable[[WorkerRole, str, Status], object],
        may_call: Callable[[str], object] = lambda address: None,
        ask: Ask = ask_worker,
    ) -> None:
        """admit: gives work to a worker, or raises FingerprintMismatch. may_call: raises ConfigError for an address
        that must not be called.
        """
        # Several workers may listen on one host, so a worker is identified by its address.
        self._following = {
            role: Following(finders, lambda found: self._changed.set(), identity=attrgetter("address"))
            for role, finders in sources.items()
            if finders
        }
        self._leases = leases
        self._admit, self._may_call, self._ask = admit, may_call, ask
        self._changed = asyncio.Event()
        self._refused: dict[tuple[WorkerRole, str], str] = {}
        self._task: asyncio.Task[None] | None = None
        self.num_refused: Counter[WorkerRole] = Counter()

    @property
    def num_failed(self) -> dict[WorkerRole, int]:
        return {role: following.num_failed for role, following in self._following.items()}

    def start(self) -> None:
        """Needs a running event loop."""
        if self._following and self._task is None:
            for following in self._following.values():
                following.start()
            self._task = keep_running(self._run, "the look-up of workers")

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        await asyncio.gather(*(following.close() for following in self._following.values()))

    async def look(self) -> None:
        """Look for workers once, and apply the result."""
        await asyncio.gather(*(following.look() for following in self._following.values()))
        await self._follow()

    async def _follow(self) -> None:
        """Remove the workers that are gone, and ask the new ones about their model and settings."""
        wanted = {(role, each.address) for role, following in self._following.items() for each in following.known}
        for role, address in self._leases.found - wanted:
            self._leases.drop_found(role, address)
        self._refused = {key: why for key, why in self._refused.items() if key in wanted}
        new = [key for key in sorted(wanted) if not self._leases.knows(*key)]
        await asyncio.gather(*(self._take(*key) for key in new))

    async def _take(self, role: WorkerRole, address: str) -> None:
        try:
            self._may_call(address)
            self._admit(role, address, await self._ask(role, address))
            self._refused.pop((role, address), None)
        except (FingerprintMismatch, ConfigError) as err:
            # Logged once per reason: a worker of another version stays refused until it is replaced.
            if self._refused.get((role, address)) != str(err):
                log.warning("the %s worker at %s is not used: %s", role, address, err)
                self.num_refused[role] += 1
            self._refused[role, address] = str(err)
        except AntefixError as err:
            log.debug("the %s worker at %s does not say yet with which arithmetic it computes: %s", role, address, err)

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            await self._follow()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S):
                    await self._changed.wait()
