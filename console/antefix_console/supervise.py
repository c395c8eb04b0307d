"""Restarts services that died, after a pause that doubles, at the same addresses, so that other services find them.

lives for HEALTHY_S     the count starts again: its next death is the first
dies NUM_DEATHS_MAX times in a row     restarting does not help: give up, with an error
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
# Pauses of 0.5 to 16 s: half a minute in all, during which a dependency may have recovered.
NUM_DEATHS_MAX: Final = 7


class GaveUp(AntefixError):
    """A service died too often in a row. The service's log says what the operator must repair."""


@dataclass(slots=True)
class Deaths:
    """Counts one role's deaths in a row."""

    num: int = 0

    def note(self, lived_s: float) -> float | None:
        """Seconds to wait before the role is restarted; None: do not restart it any more."""
        self.num = 1 if lived_s >= HEALTHY_S else self.num + 1
        return None if self.num >= NUM_DEATHS_MAX else min(PAUSE_S_MAX, PAUSE_S * 2 ** (self.num - 1))


class Supervisor:
    """Supervises one deployment. num_restarts: number of restarts so far."""

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
        """Run until cancelled.  Raises:  GaveUp."""
        keeping = [asyncio.create_task(self._keep(process)) for process in list(self._deployment.processes)]
        try:
            # Each of these runs for ever, unless it gives up.
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
                    # Errors of a start begin with the role's name already.
                    why, lived_s = f"did not start: {err}".replace(f": {process.role} did not start", "", 1), 0.0
                else:
                    break
            self.num_restarts += 1
            self._tell(f"{process.role} serves again at {process.address} (pid {process.process.pid})")
