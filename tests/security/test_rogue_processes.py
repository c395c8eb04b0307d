"""Processes that pretend to be others: no process believes them."""

import asyncio
from types import SimpleNamespace

import pytest

from antefix import rpc
from antefix.errors import ConfigError, PermissionDenied, Unavailable
from antefix.registration import Registration
from antefix.security.identity import Identity, Role
from antefix.security.process_security import OPEN
from antefix.v1 import memory_pb2
from antefix_prefill.worker.memory_service import add_memory_service
from antefix_router.gateway.app import serve_door
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.placement.directory import Directory
from antefix_router.placement.memory_feed import MemoryFeed
from tests.router.memory_worker import Memory, names_of
from tests.waiting import AT_MOST_S, until


@pytest.mark.parametrize(("cert", "believed"), [("p1", True), ("p2", False)])
async def test_events_are_believed_from_the_process_that_they_are_about(authority, monkeypatch, cert, believed):
    """A process at a worker's address sends events with another worker's certificate. The router does not follow it."""
    memory = Memory()
    memory.store(names_of("prompt", 5))
    server = await rpc.start_server(
        "127.0.0.1:0",
        lambda target: add_memory_service(memory.log, target),
        [memory_pb2.DESCRIPTOR],
        security=authority.security("prefill", cert),
    )
    monkeypatch.setattr("antefix.security.own_credentials._own", [authority.credentials("router")])
    feed = MemoryFeed(Directory(), callee=lambda _: (Role.PREFILL, "p1"))
    feed.follow([server.address])
    if believed:
        await until(lambda: feed.in_step(server.address))
        assert feed.counters.num_snapshots == 1
    else:
        await asyncio.sleep(1.0)
        assert not feed.in_step(server.address)
        assert feed.counters.num_snapshots == 0
    await feed.close()
    await server.drain(0)


async def test_a_rogue_router_gets_no_registration(authority, serve):
    """A process at a router's address has a worker's certificate. Workers do not register with it."""
    rogue = await serve(authority.security("decode", "stolen"))
    async with rpc.channel(rogue.address, of=Role.ROUTER, credentials=authority.credentials("prefill")) as channel:
        with pytest.raises(Unavailable), rpc.rpc_errors():
            await channel.unary_unary("/antefix.v1.RouterService/RegisterWorker")(b"", timeout=AT_MOST_S)


def registration(address, role="prefill"):
    return Registration(role=role, address=address, fingerprint=b"f", instance=b"i", ttl_s=5.0, said_at_ms=0)


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        ("w1.example:7002", {"w1.example"}),
        ("W1.example:7002", {"w1.example"}),
        ("w1.example:7002", {"*.example", "p1.prefill.antefix.internal"}),
        ("[2001:db8::1]:7002", {"2001:db8:0:0::1"}),
        ("10.0.0.5:7002", {"10.0.0.5"}),
        # For our workers without host names, routers check the process' own name.
        ("10.0.0.5:7002", {"p1.prefill.antefix.internal", "prefill.antefix.internal"}),
    ],
)
def test_a_worker_registers_where_its_certificate_says(address, hosts):
    mine, elsewhere = (
        Identity(role=Role.PREFILL, name="p1", hosts=frozenset(each)) for each in (hosts, {"elsewhere.example"})
    )
    registration(address).check_identity(mine)
    with pytest.raises(PermissionDenied):
        registration(address).check_identity(elsewhere)


@pytest.mark.parametrize("tls", [True, False])
async def test_an_http_door_that_others_reach_asks_for_keys(authority, tls):
    security = authority.security("router") if tls else OPEN
    config = GatewayConfig(http_address="0.0.0.0:0")
    named = "--api-keys-file or --tenants-file" if tls else "without TLS only loopback"
    with pytest.raises(ConfigError, match=named):
        await serve_door(SimpleNamespace(), SimpleNamespace(), config, SimpleNamespace(), security)
