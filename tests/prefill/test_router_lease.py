"""A worker stands with every router that the routers' names have now, and with no other."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from antefix.named_addresses import NamedAddresses, addresses_of
from antefix.secret import Keyring
from antefix.v1 import router_pb2, router_pb2_grpc
from antefix_prefill.worker import router_lease
from antefix_prefill.worker.router_lease import WorkerLease
from tests.redis_servers import until


class _Router(router_pb2_grpc.RouterServiceServicer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.told: list[float] = []
        self.address = ""

    async def RegisterWorker(
        self, request: router_pb2.RegisterWorkerRequest, context: object
    ) -> router_pb2.RegisterWorkerResponse:
        self.told.append(request.ttl_s)
        return router_pb2.RegisterWorkerResponse()


@asynccontextmanager
async def _router() -> AsyncIterator[_Router]:
    server, router = grpc.aio.server(), _Router()
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server)
    router.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield router
    finally:
        await server.stop(None)


async def test_routers_behind_a_name_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_lease, "_RENEW_S", 0.02)
    async with AsyncExitStack() as stack:
        first, second, third = [await stack.enter_async_context(_router()) for _ in range(3)]
        behind = [first.address]
        fails = False

        async def resolve(name: str) -> tuple[str, ...]:
            assert name == "routers.test:7000"
            if fails:
                raise socket.gaierror("the name server is away")
            return tuple(behind)

        lease = WorkerLease(
            ["routers.test:7000"],
            role="prefill",
            address="127.0.0.1:7002",
            fingerprint=bytes(32),
            keyring=Keyring(bytes(32)),
            resolve=resolve,
        )
        async with lease:
            await until(lambda: first.told)
            # 1. Two more: all are told.
            behind += [second.address, third.address]
            await until(lambda: second.told and third.told)
            # 2. The name server is away: nobody is forgotten.
            fails, told = True, len(second.told)
            await until(lambda: len(second.told) > told + 5)
            # 3. One goes: it hears no more.
            fails = False
            behind.remove(first.address)
            await until(
                lambda: lease._routers.now == (second.address, third.address) and first.address not in lease._tasks
            )
            told, others = len(first.told), len(third.told)
            await until(lambda: len(third.told) > others + 5)
            assert len(first.told) == told
            await lease.end()
        assert first.told[-1] > 0
        assert [second.told[-1], third.told[-1]] == [0.0, 0.0]


async def test_a_name_that_is_not_known_yet_is_called_as_it_is() -> None:
    async def resolve(name: str) -> tuple[str, ...]:
        raise socket.gaierror("not yet")

    names = NamedAddresses(["routers.test:7000", "other.test:7000"], resolve)
    assert await names.look_up() == ("routers.test:7000", "other.test:7000")


@pytest.mark.parametrize("address", ["127.0.0.1:7000", "[::1]:7000", "unix:/run/a.sock"])
async def test_an_address_is_its_own_only_one(address: str) -> None:
    assert await addresses_of(address) == (address,)


async def test_a_name_with_several_addresses_is_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        asked[host] += 1
        hosts = {"many.test": ["10.0.0.2", "10.0.0.1", "10.0.0.2"], "one.test": ["10.0.0.3"]}[host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await addresses_of("many.test:7000") == ("10.0.0.1:7000", "10.0.0.2:7000")
    # Kept as a name: certificates are checked for it.
    assert await addresses_of("one.test:7000") == ("one.test:7000",)
