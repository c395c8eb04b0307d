"""Whether a request would be served now. Supervisors wait for a process that is alive but not ready, and restart one
that is not alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from grpc_health.v1 import health_pb2

from antefix import rpc
from antefix_router.accounting import Accounts
from antefix_router.placement.workers import Workers

_EVERY_S: Final = 0.5


def why_unready(accounts: Accounts, workers: Workers) -> str:
    """Why a request would not be served; empty if it would be served. workers: those of the role that every request
    needs.
    """
    if accounts.retries.is_draining:
        return "the service is stopping"
    if accounts.writer.is_failing:
        return "the ledger cannot be written"
    if not workers.workers:
        return f"no {workers.role} worker is known"
    # A worker that has not been heard of yet may be there.
    if not any(worker.answers is not False and not worker.draining for worker in workers.workers):
        return f"no {workers.role} worker answers"
    return ""


async def tell_readiness(server: rpc.Server, services: Sequence[str], why: Callable[[], str]) -> None:
    """Until this task is cancelled, set the health of these services (grpc.health.v1) to whether they are ready. The
    health of the whole server, under the empty name, says that the server is alive.
    """
    told: bool | None = None
    while True:
        if (ready := not why()) is not told:
            told = ready
            status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
            for name in services:
                await server.health.set(name, status)
        await asyncio.sleep(_EVERY_S)
