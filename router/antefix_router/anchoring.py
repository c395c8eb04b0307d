"""Signs the latest entry of the ledger (its head), and writes the signature to other places at intervals, and once more
at the end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError
from antefix.keep_running import keep_running
from antefix_billing.anchor import make_anchor, write_anchor
from antefix_billing.ledger import Ledger
from antefix_billing.receipt import Signer

log = logging.getLogger("antefix.router")


class Anchoring:
    """num_failed: how many times writing to a place failed. A failed write is tried again after the next interval."""

    def __init__(self, ledger: Ledger, signer: Signer, places: Sequence[str], every_s: float) -> None:
        self._ledger = ledger
        self.signer = signer
        self._places = places
        self._every_s = every_s
        self._done: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self.num_failed = 0

    @property
    def anchored_to(self) -> int:
        """The last entry of the ledger whose signature is in all places."""
        return min((self._done.get(place, 0) for place in self._places), default=0)

    def start(self) -> None:
        self._task = keep_running(self._run, "the anchoring of the ledger")

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        await asyncio.to_thread(self.anchor)

    def anchor(self) -> None:
        """Write the signature of the ledger's head to each place that does not have it yet."""
        sequence, hash = self._ledger.head
        if not sequence:
            return
        anchor = make_anchor(
            self.signer, source=self._ledger.source, sequence=sequence, hash=hash, time_us=time.time_ns() // 1000
        )
        for place in self._places:
            if self._done.get(place) == sequence:
                continue
            try:
                write_anchor(anchor, place)
                self._done[place] = sequence
            except (OSError, AntefixError) as err:
                self.num_failed += 1
                log.error("the signed hash of the ledger could not be written to %s: %s", place, err)  # noqa: TRY400

    async def _run(self) -> None:
        while True:
            await asyncio.to_thread(self.anchor)
            await asyncio.sleep(self._every_s)
