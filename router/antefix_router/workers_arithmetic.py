"""The arithmetic with which the workers compute. The arithmetic is part of every block's name, so a router learns it
from the workers, and all of them must have the same.

The router's copy does not decide what may be hit: workers name KV by the arithmetic that they measured. A router with
another arithmetic would only look up the wrong names.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from antefix.errors import AntefixError, ConfigError
from antefix_router.placement.workers import Worker

log = logging.getLogger("antefix_router")

_ASK_TIMEOUT_S = 5.0
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """who: role and address of the worker. setup: its hardware and software, for people to read."""

    who: str
    arithmetic: str
    setup: str


def difference(one: Said, other: Said) -> str:
    """Why two workers cannot share KV, and what to do."""
    return (
        f"workers cannot share KV, their arithmetic differs: {one.who} computes {one.arithmetic} ({one.setup}),"
        f" {other.who} computes {other.arithmetic} ({other.setup}); run them on set-ups that `antefix doctor` gives one"
        " name, or tell those that only read to take the other's with --arithmetic"
    )


def agreed(said: Sequence[Said]) -> str:
    """The one arithmetic that all workers have; empty if no worker reported any.

    Raises:  ConfigError: there are two.
    """
    for one in said:
        if one.arithmetic != said[0].arithmetic:
            raise ConfigError(difference(said[0], one))
    return said[0].arithmetic if said else ""


async def learn(workers: Sequence[Worker]) -> str:
    """Ask the workers until one has answered. Returns the arithmetic of all workers that answered.

    Raises:  ConfigError: they differ.
    """
    is_told = False
    while not (said := await _ask(workers)):
        if not is_told:
            log.warning(
                "no worker has said yet with which arithmetic it computes, and blocks cannot be named without "
                "knowing it"
            )
            is_told = True
        await asyncio.sleep(_RETRY_S)
    return agreed(said)


async def _ask(workers: Iterable[Worker]) -> list[Said]:
    async def ask(worker: Worker) -> Said | None:
        try:
            status = await worker.client.status(timeout_s=_ASK_TIMEOUT_S)
        except AntefixError as err:
            log.info(
                "%s worker %s does not say with which arithmetic it computes: %s", worker.role, worker.address, err
            )
            return None
        worker.arithmetic, worker.setup = status.arithmetic, status.setup
        who = f"{worker.role} worker {worker.address}"
        return Said(who=who, arithmetic=status.arithmetic, setup=status.setup) if status.arithmetic else None

    return [said for said in await asyncio.gather(*map(ask, workers)) if said is not None]
