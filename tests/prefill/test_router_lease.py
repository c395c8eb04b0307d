"""A worker registers with every router that it is given or that a DNS name has now, and with no other."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from antefix.discovery import dns_name
from antefix.secret import Keyring
from antefix.v1 import router_pb2, router_pb2_grpc
from antefix_prefill.worker import router_lease
from antefix_prefill.worker.router_lease import WorkerLease
from tests.waiting import until


class _Router(router_pb2_grpc.RouterServiceServicer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.told: list[float] = []
        self.host, self.port = "", 0

    async def RegisterWorker(
        self, request: router_pb2.RegisterWorkerRequest, context: object
    ) -> router_pb2.RegisterWorkerResponse:
        self.told.append(request.ttl_s)
        return router_pb2.RegisterWorkerResponse()


@asynccontextmanager
async def _router(host: str, port: int) -> AsyncIterator[_Router]:
    server, router = grpc.aio.server(), _Router()
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server)
    router.host = host
    router.port = server.add_insecure_port(f"{host}:{port}")
    await server.start()
    try:
        yield router
    finally:
        await server.stop(None)


async def test_routers_behind_a_name_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_lease, "_RENEW_S", 0.02)
    monkeypatch.setattr(dns_name, "KEPT_S", 0.1)
    monkeypatch.setattr(dns_name.DnsName, "every_s", 0.02)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(_router("127.0.0.1", 0))
        second, third = [await stack.enter_async_context(_router(f"127.0.0.{n}", first.port)) for n in (2, 3)]
        behind = [first.host]
        fails = False

        async def resolve(host: str, port: int) -> tuple[str, ...]:
            assert (host, port) == ("routers.test", first.port)
            if fails:
                raise socket.gaierror("the name server is away")
            return tuple(behind)

        lease = WorkerLease(
            [f"dns:routers.test:{first.port}"],
            role="prefill",
            address="127.0.0.1:7002",
            fingerprint=bytes(32),
            keyring=Keyring(bytes(32)),
            resolve=resolve,
        )
        async with lease:
            await until(lambda: first.told)
            # 1. Two more routers appear, and the worker registers with all.
            behind += [second.host, third.host]
            await until(lambda: second.told and third.told)
            # 2. The name server is down, and the worker forgets no router.
            fails, told = True, len(second.told)
            await until(lambda: len(second.told) > told + 5)
            # 3. One router leaves, and the worker no longer registers with it.
            fails = False
            behind.remove(first.host)
            await until(lambda: f"{first.host}:{first.port}" not in lease._tasks)
            told, others = len(first.told), len(third.told)
            await until(lambda: len(third.told) > others + 5)
            assert len(first.told) == told
            await lease.end()
        assert first.told[-1] > 0
        assert [second.told[-1], third.told[-1]] == [0.0, 0.0]
