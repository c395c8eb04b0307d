"""Running one history from its seed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.histories.simulated_loop import SimulatedLoop, Stuck, simulated
from tests.histories.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """error: the invariant that did not hold, or empty.  trace: digest of all counts and of all that clients were told.

    recovery_s: by fault, the simulated time from its end to the next complete answer to any client.
    """

    seed: int
    error: str
    trace: str
    counts: Counter[str]
    recovery_s: dict[str, list[float]]

    @property
    def num_operations(self) -> int:
        return self.counts["calls"] + self.counts["requests"] + self.counts["faults"]


def run_history(seed: int) -> Outcome:
    """The same seed gives the same outcome."""
    rng = random.Random(seed)
    loop = SimulatedLoop(rng)
    # Disabling logs empties the caches of all loggers, so a caller disables them once for all histories.
    was_disabled = logging.root.manager.disable
    if was_disabled < logging.CRITICAL:
        logging.disable(logging.CRITICAL)
    memory = Path("/dev/shm")
    # Collecting garbage would take a sixth of the time, so a history's cycles are collected only after its end.
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name, simulated(loop, rng):
            asyncio.set_event_loop(loop)
            # These errors are of a dead router's tasks, whose caller no longer exists.
            loop.set_exception_handler(lambda *_: None)
            world = World(Path(name), loop, rng)
            error = ""
            try:
                loop.run_until_complete(world.run())
            except (AssertionError, Stuck) as err:
                error = f"{type(err).__name__}: {err}"
            except Exception as err:
                error = f"not one of our errors: {type(err).__name__}: {err}"
            _end(loop, world)
    finally:
        if was_collecting:
            gc.enable()
        if was_disabled < logging.CRITICAL:
            logging.disable(was_disabled)
        asyncio.set_event_loop(None)
        loop.close()
    told = sorted(world.told.answers.items()), sorted(world.told.errors.items()), sorted(world.counts.items())
    trace = hashlib.blake2b(repr((told, round(loop.now_s, 9))).encode(), digest_size=8).hexdigest()
    return Outcome(seed=seed, error=error, trace=trace, counts=world.counts, recovery_s=world.recovery_s)


def _end(loop: SimulatedLoop, world: World) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
    with contextlib.suppress(Stuck):
        loop.run_until_complete(asyncio.sleep(0))
    if world.store.engine is not None and world.store.engine.is_open:
        world.store.engine.abandon()
    world.accounts.ledger.close()
