"""Connections without calls are limited by address too. Only the excess connections of that address are closed."""

import contextlib
import socket

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from antefix import rpc
from antefix.security import idle_connections
from antefix.security.caller_limits import CallerLimits, peer_of
from antefix.security.identity import Identity, Role
from antefix.security.idle_connections import Connection, accepted, close, to_close
from antefix.security.process_security import ProcessSecurity
from tests.waiting import AT_MOST_S, until

TENANT = Identity(role=Role.TENANT, name="acme", tenants=frozenset({"acme"}))
ROUTER = Identity(role=Role.ROUTER)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("ipv4:10.0.0.1:4001", ("10.0.0.1", 4001)),
        ("ipv6:[2001:db8::7]:4001", ("2001:db8::7", 4001)),
        ("ipv6:%5B::1%5D:5678", ("::1", 5678)),
        ("ipv6:%5B::ffff:10.0.0.1%5D:4001", ("10.0.0.1", 4001)),
        ("unix:", None),
        ("unix:/run/antefix/router.sock", None),
    ],
)
def test_ends_are_named_as_the_kernel_names_them(name, end):
    assert peer_of(name) == end


def connections(address, number, first=0):
    return [Connection(first + index, (address, 4000 + index)) for index in range(number)]


def test_what_is_too_much_of_an_address_is_closed_and_of_that_what_never_called():
    limits = CallerLimits(connections_max=3)
    greedy, modest = connections("10.0.0.1", 8), connections("10.0.0.2", 3, first=100)
    with limits.taken("ipv4:10.0.0.1:4000", TENANT):
        pass
    with limits.taken("ipv4:10.0.0.1:4001", TENANT):
        chosen = to_close(greedy + modest, limits)
        # Port 4001 has a call, 4000 had one, and three connections stay.
        assert [each.peer[1] for each in chosen] == [4002, 4003, 4004, 4005, 4006]
    assert to_close(modest, limits) == []


def test_a_services_connections_are_neither_counted_nor_closed():
    limits = CallerLimits(connections_max=2)
    held = connections("10.0.0.1", 6)
    for each in held[:4]:
        with limits.taken(f"ipv4:10.0.0.1:{each.peer[1]}", ROUTER):
            pass
    assert to_close(held, limits) == []
    assert len(to_close([*held, Connection(50, ("10.0.0.1", 5000))], limits)) == 1


def test_ends_that_are_gone_are_forgotten():
    limits = CallerLimits()
    with limits.taken("ipv4:10.0.0.1:1", ROUTER), limits.taken("ipv4:10.0.0.1:2", ROUTER):
        limits.keep({("10.0.0.1", 2)})
        assert limits.is_of_service(("10.0.0.1", 1)), "a call runs on it"
    limits.keep({("10.0.0.1", 2)})
    assert not limits.had_calls(("10.0.0.1", 1)) and limits.had_calls(("10.0.0.1", 2))


def test_a_descriptor_that_is_another_connections_by_now_is_left_alone():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        taken, _ = server.accept()
        with taken:
            (found,) = accepted(server.getsockname()[1])
            assert found.peer == client.getsockname() and found.descriptor == taken.fileno()
            assert not close(Connection(found.descriptor, ("127.0.0.1", 1)))
            taken.sendall(b"x")
            assert client.recv(1) == b"x"
            assert close(found) and client.recv(1) == b""
    assert not close(found)


async def test_a_server_keeps_so_many_idle_connections_of_an_address_and_its_calls_go_on(monkeypatch):
    monkeypatch.setattr(rpc, "CallerLimits", lambda: CallerLimits(connections_max=4))
    monkeypatch.setattr(idle_connections, "LOOK_S", 0.05)
    security = ProcessSecurity(Role.ROUTER)

    def closed():
        return sum(
            sample.value
            for family in security.guard.metrics()
            for sample in family.samples
            if sample.labels.get("method") == "(connection)" and sample.name.endswith("_total")
        )

    server = await rpc.start_server("127.0.0.1:0", lambda _: None, [], security=security)
    host, _, port = server.address.rpartition(":")
    async with rpc.channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        with contextlib.ExitStack() as held:
            idle = [held.enter_context(socket.create_connection((host, int(port)))) for _ in range(20)]
            # All but four of the 21 connections are closed, but never the watching one.
            await until(lambda: closed() == 17 and len(accepted(int(port))) == 4)
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=AT_MOST_S)
            assert sum(each.fileno() >= 0 for each in idle) == 20
            assert not watching.done()
        watching.cancel()
    await server.drain(0)
    assert all(watch.done() for watch in server.watches)
