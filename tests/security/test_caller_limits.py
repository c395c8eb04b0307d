"""The calls and connections of one address to a port are limited, and other addresses keep theirs."""

import asyncio
import contextlib

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from antefix import rpc
from antefix.errors import Overloaded
from antefix.security.caller_limits import CallerLimits
from antefix.security.identity import LOCAL, Identity, Role
from tests.waiting import AT_MOST_S

TENANT = Identity(role=Role.TENANT, name="acme", tenants=frozenset({"acme"}))
ONE, SAME, OTHER = "ipv4:10.0.0.1:4001", "ipv4:10.0.0.1:4002", "ipv6:[2001:db8::7]:4001"


def take(stack, limits, peer, identity=TENANT):
    stack.enter_context(limits.taken(peer, identity))


def test_an_address_has_so_many_calls_whatever_its_connections():
    limits = CallerLimits(calls_max=3, connections_max=10)
    with contextlib.ExitStack() as stack:
        for peer in (ONE, ONE, SAME):
            take(stack, limits, peer)
        with pytest.raises(Overloaded, match="3 calls from your address"):
            take(stack, limits, SAME)
        take(stack, limits, OTHER)
    with contextlib.ExitStack() as stack:
        take(stack, limits, ONE)
    assert not limits._calls and not limits._on


def test_an_address_has_so_many_connections_and_may_put_more_calls_on_them():
    limits = CallerLimits(calls_max=100, connections_max=2)
    with contextlib.ExitStack() as stack:
        for peer in (ONE, SAME):
            take(stack, limits, peer)
        with pytest.raises(Overloaded, match="2 connections"):
            take(stack, limits, "ipv4:10.0.0.1:4003")
        take(stack, limits, SAME)
        take(stack, limits, OTHER)


@pytest.mark.parametrize("role", [Role.ROUTER, Role.PREFILL, Role.DECODE, Role.KVSTORE, Role.FRONTEND])
def test_services_that_carry_many_callers_are_not_counted(role):
    limits = CallerLimits(calls_max=1, connections_max=1)
    with contextlib.ExitStack() as stack:
        for peer in (ONE, ONE, SAME):
            take(stack, limits, peer, Identity(role=role))
        assert not limits._calls and not limits._on
        # So the service's address has the full limit for its own callers.
        take(stack, limits, ONE)
        with pytest.raises(Overloaded):
            take(stack, limits, ONE)


def test_a_socket_file_is_one_address():
    limits = CallerLimits(calls_max=1)
    with contextlib.ExitStack() as stack:
        take(stack, limits, "unix:", LOCAL)
        with pytest.raises(Overloaded):
            take(stack, limits, "unix:", LOCAL)


async def test_a_server_refuses_the_call_that_is_too_many_and_counts_it(monkeypatch):
    monkeypatch.setattr(rpc, "CallerLimits", lambda: CallerLimits(calls_max=1))
    server = await rpc.start_server("127.0.0.1:0", lambda _: None, [])
    async with rpc.channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(Overloaded, match="1 calls from your address"), rpc.rpc_errors():
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=AT_MOST_S)
        watching.cancel()
        async with asyncio.timeout(AT_MOST_S):
            while True:
                with contextlib.suppress(Overloaded), rpc.rpc_errors():
                    await stub.Check(health_pb2.HealthCheckRequest(), timeout=AT_MOST_S)
                    break
                await asyncio.sleep(0.01)
    await server.drain(0)
