"""A worker's standing with its routers: registered while it serves, again and again, and taken out before it drains.

A router that is away is asked again; it knows the worker within a third of a lease of coming back.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from types import TracebackType

from antefix import rpc
from antefix.errors import AntefixError
from antefix.v1 import router_pb2, router_pb2_grpc

log = logging.getLogger("antefix.worker")

LEASE_TTL_S = 6.0
# Two renewals may be lost before the lease is.
_RENEW_S = LEASE_TTL_S / 3
_CALL_TIMEOUT_S = 2.0


class WorkerLease:
    """`async with`: keeps the lease with every router; without routers it does nothing."""

    def __init__(self, routers: Sequence[str], *, role: str, address: str, fingerprint: bytes) -> None:
        self._routers = tuple(dict.fromkeys(routers))
        self._request = router_pb2.RegisterWorkerRequest(
            address=address, role=role, fingerprint=fingerprint, instance=secrets.token_bytes(16), ttl_s=LEASE_TTL_S
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> WorkerLease:
        self._tasks = [asyncio.create_task(self._keep(router)) for router in self._routers]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def end(self) -> None:
        """Ask for no more work. A router that does not hear it finds out when the lease runs out, or by calling."""
        await self._stop()
        self._request.ttl_s = 0
        await asyncio.gather(*(self._say(router) for router in self._routers))

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, router: str) -> None:
        known = True
        async with rpc.channel(router) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            while True:
                try:
                    await self._register(stub)
                    known = True
                except AntefixError as err:
                    if known:
                        log.warning("router %s does not know us: %s", router, err)
                    known = False
                await asyncio.sleep(_RENEW_S)

    async def _say(self, router: str) -> None:
        async with rpc.channel(router) as channel:
            try:
                await self._register(router_pb2_grpc.RouterServiceStub(channel))
            except AntefixError as err:
                log.info("router %s was not told that we leave: %s", router, err)

    async def _register(self, stub: router_pb2_grpc.RouterServiceStub) -> None:
        with rpc.rpc_errors():
            await stub.RegisterWorker(self._request, timeout=_CALL_TIMEOUT_S)
