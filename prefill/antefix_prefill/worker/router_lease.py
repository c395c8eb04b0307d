"""Keeps a worker registered with its routers while it serves, and deregisters it before it drains.

A router that does not answer is asked again, so after it comes back it knows the worker within a third of a lease.
`dns:HOST:PORT` stands for a router at each address of the name. The name is looked up again at the same intervals, so
routers may come and go.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from types import TracebackType

from antefix import rpc
from antefix.discovery import DnsName, Following, Found
from antefix.discovery.dns_name import PREFIX, Resolve, addresses_of
from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError
from antefix.keep_running import keep_running
from antefix.registration import Registration
from antefix.secret import Keyring
from antefix.security.identity import Role
from antefix.v1 import router_pb2, router_pb2_grpc

log = logging.getLogger("antefix_prefill.worker")

LEASE_TTL_S = 6.0
# Two renewals in a row may fail before the lease expires.
_RENEW_S = LEASE_TTL_S / 3
_CALL_TIMEOUT_S = 2.0


class WorkerLease:
    """A context manager (`async with`) that keeps a lease with every router. Without routers it does nothing."""

    def __init__(
        self,
        routers: Sequence[str],
        *,
        role: str,
        address: str,
        fingerprint: bytes,
        keyring: Keyring,
        arithmetic: str = "",
        setup: str = "",
        resolve: Resolve = addresses_of,
        block_size: int = 0,
    ) -> None:
        self._block_size = block_size
        self._arithmetic, self._setup = arithmetic, setup
        self._fixed = tuple(dict.fromkeys(each for each in routers if not each.startswith(PREFIX)))
        names = [DnsName(each, resolve=resolve) for each in dict.fromkeys(routers) if each.startswith(PREFIX)]
        # Identified by address, because two routers may listen on one host.
        self._following = Following(names, self._changed, identity=attrgetter("address"))
        self._role = role
        self._address = address
        self._fingerprint = fingerprint
        self._keyring = keyring
        self._instance = secrets.token_bytes(16)
        self._ttl_s = LEASE_TTL_S
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Tasks of routers that are gone.
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> WorkerLease:
        self._changed(frozenset())
        self._following.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def end(self) -> None:
        """Ask for no more work. A router that misses the deregistration learns of it when the lease expires, or when it
        calls the worker.
        """
        await self._stop()
        self._ttl_s = 0.0
        await asyncio.gather(*(self._say(router) for router in self._routers()))

    def _routers(self) -> list[str]:
        """Routers that the settings name, and routers that were found last."""
        return list(dict.fromkeys((*self._fixed, *sorted(each.address for each in self._following.known))))

    async def _stop(self) -> None:
        await self._following.close()
        tasks, self._tasks = [*self._tasks.values(), *self._ending], {}
        await end_tasks(tasks)

    def _changed(self, found: frozenset[Found]) -> None:
        """Keep one task for each router that exists now."""
        wanted = self._routers()
        for router in wanted:
            if router not in self._tasks:
                self._tasks[router] = keep_running(partial(self._keep, router), "the lease at the router", of=router)
        for router in [router for router in self._tasks if router not in wanted]:
            task = self._tasks.pop(router)
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _keep(self, router: str) -> None:
        known = True
        async with rpc.channel(router, of=Role.ROUTER) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            while True:
                try:
                    await self._register(stub)
                    known = True
                except AntefixError as err:
                    if known:
                        log.warning("router %s did not accept this worker's registration: %s", router, err)
                    known = False
                await asyncio.sleep(_RENEW_S)

    async def _say(self, router: str) -> None:
        async with rpc.channel(router, of=Role.ROUTER) as channel:
            try:
                await self._register(router_pb2_grpc.RouterServiceStub(channel))
            except AntefixError as err:
                log.info("router %s could not be told that this worker is shutting down: %s", router, err)

    async def _register(self, stub: router_pb2_grpc.RouterServiceStub) -> None:
        registration = Registration(
            role=self._role,
            address=self._address,
            fingerprint=self._fingerprint,
            instance=self._instance,
            ttl_s=self._ttl_s,
            said_at_ms=round(1000 * time.time()),
        )
        request = router_pb2.RegisterWorkerRequest(
            role=registration.role,
            address=registration.address,
            fingerprint=registration.fingerprint,
            instance=registration.instance,
            ttl_s=registration.ttl_s,
            said_at_ms=registration.said_at_ms,
            proof=registration.proof(self._keyring),
            arithmetic=self._arithmetic,
            setup=self._setup,
            block_size=self._block_size,
        )
        with rpc.rpc_errors():
            await stub.RegisterWorker(request, timeout=_CALL_TIMEOUT_S)
