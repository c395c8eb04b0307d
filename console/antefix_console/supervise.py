"""Starts roles again that died: with a pause that doubles, at the same addresses, so that the others find them.

lives for HEALTHY_S     it counts as well, and the next death is its first one
dies NUM_DEATHS_MAX times in a row     something is wrong that starting again does not cure: give up, loudly
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from antefix.errors import AntefixError
from antefix_console.deployment import Deployment, RoleProcess

PAUSE_S: Final = 0.5
PAUSE_S_MAX: Final = 30.0
HEALTHY_S: Final = 60.0
# Pauses of 0.5 to 16 s: half a minute, in which what the role needs may have come back.
NUM_DEATHS_MAX: Final = 7


class GaveUp(AntefixError):
    """A role died again and again. The operator mends what its log says."""


@dataclass(slots=True)
class Deaths:
    """Of one role in a row."""

    num: int = 0

    def note(self, lived_s: float) -> float | None:
        """Seconds to wait before it is started again; None: no more."""
        self.num = 1 if lived_s >= HEALTHY_S else self.num + 1
        return None if self.num >= NUM_DEATHS_MAX else min(PAUSE_S_MAX, PAUSE_S * 2 ** (self.num - 1))


class Supervisor:
    """Of one deployment. num_restarts: roles that were started again."""

    def __init__(
        self,
        deployment: Deployment,
        tell: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.num_restarts = 0
        self._deployment = deployment
        self._tell = tell
        self._clock = clock
        self._sleep = sleep

    async def run(self) -> None:
        """Until cancelled.  Raises:  GaveUp."""
        keeping = [asyncio.create_task(self._keep(process)) for process in list(self._deployment.processes)]
        try:
            # Each continues for ever, so the first one that ends has given up.
            await asyncio.gather(*keeping)
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)

    async def _keep(self, process: RoleProcess) -> None:
        deaths = Deaths()
        while True:
            since = self._clock()
            why = f"ended with {await process.process.wait()}"
            lived_s = self._clock() - since
            while True:
                pause_s = deaths.note(lived_s)
                if pause_s is None:
                    raise GaveUp(
                        f"{process.role} died {deaths.num} times in a row and is not started again; it {why}; see"
                        f" {process.log_path}"
                    )
                self._tell(f"{process.role} {why}; it is started again in {pause_s:g} s; see {process.log_path}")
                await self._sleep(pause_s)
                try:
                    process = await self._deployment.restart(process)
                except AntefixError as err:
                    why, lived_s = f"did not start: {err}", 0.0
                else:
                    break
            self.num_restarts += 1
            self._tell(f"{process.role} serves again at {process.address} (pid {process.process.pid})")
