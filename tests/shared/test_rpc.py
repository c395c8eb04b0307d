"""gRPC: errors keep their class over the wire, health and reflection work, ports in use are errors."""

import asyncio
import contextlib
import resource
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from antefix import errors, rpc
from antefix.v1 import router_pb2, router_pb2_grpc, window_pb2, window_pb2_grpc
from tests.waiting import AT_MOST_S


class Failing(router_pb2_grpc.RouterServiceServicer):
    def __init__(self, err):
        self.err = err

    async def RouterStatus(self, request, context):
        raise self.err

    async def Generate(self, request, context):
        yield router_pb2.GenerateResponse(text="first")
        raise self.err


async def start(err):
    return await rpc.start_server(
        "127.0.0.1:0",
        lambda server: router_pb2_grpc.add_RouterServiceServicer_to_server(Failing(err), server),
        [router_pb2.DESCRIPTOR],
    )


ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, errors.AntefixError)
    and kind not in (errors.AntefixError, errors.InternalError)
]


@pytest.mark.parametrize("kind", ALL)
async def test_an_error_arrives_as_the_class_that_was_raised(kind):
    server = await start(kind("what was wrong"))
    stub = router_pb2_grpc.RouterServiceStub(rpc.channel(server.address))
    with pytest.raises(kind, match="what was wrong") as caught, rpc.rpc_errors():
        await stub.RouterStatus(router_pb2.RouterStatusRequest(), timeout=AT_MOST_S)
    assert type(caught.value) is kind
    await server.drain(0)


async def test_an_error_in_a_stream_comes_after_what_was_sent():
    server = await start(errors.Overloaded("full", retry_after_s=1.5))
    stub = router_pb2_grpc.RouterServiceStub(rpc.channel(server.address))
    texts = []
    with pytest.raises(errors.Overloaded) as caught, rpc.rpc_errors():
        async for message in stub.Generate(router_pb2.GenerateRequest(), timeout=AT_MOST_S):
            texts.append(message.text)
    assert texts == ["first"]
    assert caught.value.retry_after_s == 1.5
    await server.drain(0)


async def test_a_refusal_is_held_back_for_the_time_that_it_says():
    refusal = errors.Overloaded("full", retry_after_s=1.5)
    refusal.hold_s = 0.25
    server = await start(refusal)
    stub = router_pb2_grpc.RouterServiceStub(rpc.channel(server.address))
    begun = time.monotonic()
    with pytest.raises(errors.Overloaded), rpc.rpc_errors():
        await stub.RouterStatus(router_pb2.RouterStatusRequest(), timeout=AT_MOST_S)
    assert time.monotonic() - begun >= 0.25
    await server.drain(0)


@pytest.mark.parametrize("kind", [RuntimeError, errors.InternalError])
async def test_a_bug_shows_an_id_and_nothing_else(caplog, kind):
    server = await start(kind("a secret path"))
    stub = router_pb2_grpc.RouterServiceStub(rpc.channel(server.address))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RouterStatus(router_pb2.RouterStatusRequest(), timeout=AT_MOST_S)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert "a secret path" in caplog.text
    shown = r"internal error [0-9a-f]{12}; the service's log has it"
    with pytest.raises(errors.InternalError, match=shown) as ours, rpc.rpc_errors():
        await stub.RouterStatus(router_pb2.RouterStatusRequest(), timeout=AT_MOST_S)
    assert not isinstance(ours.value, errors.InvalidRequest)
    await server.drain(0)


async def test_nobody_listening_is_unavailable():
    server = await start(RuntimeError())
    address = server.address
    await server.drain(0)
    stub = router_pb2_grpc.RouterServiceStub(rpc.channel(address))
    with pytest.raises(errors.Unavailable), rpc.rpc_errors():
        await stub.RouterStatus(router_pb2.RouterStatusRequest(), timeout=AT_MOST_S)


async def test_a_call_to_another_roles_address_says_so():
    server = await start(RuntimeError())
    stub = window_pb2_grpc.WindowServiceStub(rpc.channel(server.address))
    with pytest.raises(errors.Unavailable, match="belongs to another role"), rpc.rpc_errors():
        await stub.WindowStatus(window_pb2.WindowStatusRequest(), timeout=AT_MOST_S)
    await server.drain(0)


async def test_draining_says_not_serving_and_health_says_serving_before():
    server = await start(RuntimeError())
    stub = health_pb2_grpc.HealthStub(rpc.channel(server.address))
    for name in ("", "antefix.v1.RouterService"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=AT_MOST_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.health.enter_graceful_shutdown()
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=AT_MOST_S)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.drain(0)


async def test_health_can_be_watched_until_the_service_drains():
    server = await start(RuntimeError())
    watch = health_pb2_grpc.HealthStub(rpc.channel(server.address)).Watch(
        health_pb2.HealthCheckRequest(), timeout=2 * AT_MOST_S
    )
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    # The stream reports the end and then ends, because an endless call must not delay the service for its whole grace
    # period.
    drain = asyncio.create_task(server.drain(2 * AT_MOST_S))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await asyncio.wait_for(drain, AT_MOST_S)
    assert await watch.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_stock_reflection_client_finds_the_service():
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    server = await start(RuntimeError())
    stub = reflection_pb2_grpc.ServerReflectionStub(rpc.channel(server.address))
    call = stub.ServerReflectionInfo(timeout=AT_MOST_S)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    assert "antefix.v1.RouterService" in [service.name for service in answer.list_services_response.service]
    call.cancel()
    await server.drain(0)


async def test_a_port_in_use_is_a_clear_error():
    server = await start(RuntimeError())
    with pytest.raises(errors.ConfigError, match=server.address):
        await rpc.start_server(server.address, lambda s: None, [])
    await server.drain(0)


@pytest.mark.slow
async def test_a_port_limits_connections_and_closes_silent_ones(monkeypatch):
    """Runs twice, with options that are smaller and faster than the real ones."""
    monkeypatch.setattr(rpc, "_connections_limit", lambda: ("grpc.max_allowed_incoming_connections", 3))
    monkeypatch.setattr(rpc, "SERVER_OPTIONS", (*rpc.SERVER_OPTIONS, ("grpc.server_handshake_timeout_ms", 300)))
    server = await rpc.start_server("127.0.0.1:0", lambda _: None, [])
    pairs = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(8)]
    async with asyncio.timeout(AT_MOST_S):
        # All are closed: those above the limit at once, the others because they never sent a request.
        for reader, writer in pairs:
            with contextlib.suppress(ConnectionError):
                while await reader.read(1000):
                    continue
            writer.close()
    channel = rpc.channel(server.address)
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=AT_MOST_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await channel.close()
    await server.drain(0)


def test_the_limit_of_connections_leaves_descriptors():
    name, most = rpc._connections_limit()
    assert name == "grpc.max_allowed_incoming_connections"
    assert 8 <= most <= max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


@pytest.mark.parametrize("details", ["Deadline Exceeded", "Stream removed (Deadline Exceeded)", ""])
def test_a_call_that_ran_out_of_time_says_so_in_our_words(details):
    none = grpc.aio.Metadata()
    err = rpc.from_rpc_error(grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, none, none, details=details))
    assert isinstance(err, errors.DeadlineExceeded)
    assert str(err) == "the time allowed for this call was over before the answer was complete"
