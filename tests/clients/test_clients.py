"""Clients can be closed and used in `async with`, return status as plain values, and have a blocking form."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from google.protobuf.message import Message

from antefix import (
    BlockingPrefillClient,
    BlockingRouterClient,
    DecodeClient,
    InvalidRequest,
    PrefillClient,
    RouterClient,
    Sampling,
    Unavailable,
    WindowClient,
    rpc,
)
from antefix.clients import statuses
from antefix.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    window_pb2,
    window_pb2_grpc,
)
from antefix.wire import tokens_to_wire
from tests.waiting import AT_MOST_S

TEXTS = ["Once", " there", " was"]


class Router(router_pb2_grpc.RouterServiceServicer):
    """Sends three texts, then waits for ever if the request asks for that. `ended` is set when such a call ends."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    async def RouterStatus(self, request: Any, context: Any) -> router_pb2.RouterStatusResponse:
        worker = router_pb2.WorkerStatus(address="127.0.0.1:1", role="decode", serving=True, num_tokens_queued=1 << 40)
        counters = router_pb2.RouterCounters(led=3)
        return router_pb2.RouterStatusResponse(workers=[worker], model="tiny", block_size=128, counters=counters)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[router_pb2.GenerateResponse]:
        try:
            for text in TEXTS:
                yield router_pb2.GenerateResponse(text=text, tokens=tokens_to_wire([7]))
            if request.text == "for ever":
                await asyncio.sleep(600)
            yield router_pb2.GenerateResponse(finish_reason="stop")
        finally:
            self.ended.set()


class Worker(
    prefill_pb2_grpc.PrefillServiceServicer,
    decode_pb2_grpc.DecodeServiceServicer,
    window_pb2_grpc.WindowServiceServicer,
):
    async def PrefillStatus(self, request: Any, context: Any) -> prefill_pb2.PrefillStatusResponse:
        return prefill_pb2.PrefillStatusResponse(num_blocks=9, prefill_tokens_per_s=2.5)

    async def DecodeStatus(self, request: Any, context: Any) -> decode_pb2.DecodeStatusResponse:
        return decode_pb2.DecodeStatusResponse(num_running=2)

    async def WindowStatus(self, request: Any, context: Any) -> window_pb2.WindowStatusResponse:
        way = window_pb2.PlannedWay(kind="replay", replay_tokens=5)
        plan = window_pb2.PlanRecord(taken=way, weighed=[way, way])
        kind = window_pb2.PlanKindStatus(kind="cold", num_plans=4)
        return window_pb2.WindowStatusResponse(strategy="auto", kinds=[kind], plans=[plan])


def register(router: Router, server: Any) -> None:
    worker = Worker()
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server)
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(worker, server)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(worker, server)
    window_pb2_grpc.add_WindowServiceServicer_to_server(worker, server)


@pytest.fixture
async def served() -> AsyncIterator[tuple[Router, str]]:
    """A service on the test's own event loop."""
    router = Router()
    server = await rpc.start_server("127.0.0.1:0", lambda target: register(router, target), [router_pb2.DESCRIPTOR])
    yield router, server.address
    await server.drain(0)


@pytest.fixture
def elsewhere() -> Iterator[tuple[Router, str]]:
    """The same service in a separate thread, for calls that block."""
    ready: list[tuple[Router, str]] = []
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        router = Router()
        server = await rpc.start_server("127.0.0.1:0", lambda target: register(router, target), [router_pb2.DESCRIPTOR])
        ready.append((router, server.address))
        started.set()
        await asyncio.to_thread(stop.wait)
        await server.drain(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(AT_MOST_S)
    yield ready[0]
    stop.set()
    thread.join(AT_MOST_S)


def _holds_protobuf(value: Any) -> bool:
    if dataclasses.is_dataclass(value):
        return any(_holds_protobuf(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        return any(map(_holds_protobuf, value))
    return isinstance(value, Message) or not isinstance(value, str | bytes | int | float | bool)


async def test_status_is_a_value_with_no_protobuf_in_it(served: tuple[Router, str]) -> None:
    address = served[1]
    async with (
        RouterClient(address) as router,
        PrefillClient(address) as prefill,
        DecodeClient(address) as decode,
        WindowClient(address) as window,
    ):
        status = await router.status()
        assert (status.workers[0].num_tokens_queued, status.counters.led) == (1 << 40, 3)
        assert (await prefill.status()).prefill_tokens_per_s == 2.5
        assert (await decode.status()).num_running == 2
        shown = await window.status(num_plans_max=1)
        assert shown.plans[0].weighed[1].replay_tokens == 5
        for value in (status, await prefill.status(), await decode.status(), shown):
            assert not _holds_protobuf(value)
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, dataclasses.fields(value)[0].name, b"")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (statuses.PrefillStatus, prefill_pb2.PrefillStatusResponse),
        (statuses.DecodeStatus, decode_pb2.DecodeStatusResponse),
        (statuses.RouterStatus, router_pb2.RouterStatusResponse),
        (statuses.WorkerState, router_pb2.WorkerStatus),
        (statuses.RouterCounters, router_pb2.RouterCounters),
        (statuses.AnswerCounters, router_pb2.AnswerCounters),
        (statuses.WindowStatus, window_pb2.WindowStatusResponse),
        (statuses.PlanKindStatus, window_pb2.PlanKindStatus),
        (statuses.PlannedRestore, window_pb2.PlanRecord),
        (statuses.PlannedWay, window_pb2.PlannedWay),
    ],
)
def test_a_status_has_every_field_of_its_message(value: Any, message: Any) -> None:
    assert {field.name for field in dataclasses.fields(value)} == set(message.DESCRIPTOR.fields_by_name)


async def test_a_closed_client_has_let_go_and_may_be_used_again(served: tuple[Router, str]) -> None:
    client = RouterClient(served[1])
    await client.close()
    assert client._channel is None, "a client that was never used has no connection"
    async with client:
        assert (await client.status()).model == "tiny"
        first = client._channel
        assert first is not None
    assert client._channel is None
    with pytest.raises(Exception, match=r"[Cc]losed"):
        await first.channel_ready()
    assert (await client.status()).model == "tiny"
    await client.close()


async def test_closing_ends_a_call_that_is_under_way(served: tuple[Router, str]) -> None:
    router, address = served
    client = RouterClient(address)
    stream = client.generate("for ever", Sampling(max_tokens=9))
    assert [(await anext(stream)).text for _ in TEXTS] == TEXTS
    await client.close()
    with pytest.raises((asyncio.CancelledError, Unavailable)):
        await anext(stream)
    assert await asyncio.to_thread(router.ended.wait, AT_MOST_S)


def test_a_script_generates_without_await(elsewhere: tuple[Router, str]) -> None:
    with BlockingRouterClient(elsewhere[1]) as router:
        messages = list(router.generate("tale", Sampling(max_tokens=9)))
        assert [message.text for message in messages] == [*TEXTS, ""]
        assert messages[-1].finish_reason == "stop"
        assert router.status().workers[0].role == "decode"


def test_leaving_a_blocking_stream_ends_the_call(elsewhere: tuple[Router, str]) -> None:
    with BlockingRouterClient(elsewhere[1]) as router:
        stream = router.generate("for ever", Sampling(max_tokens=9))
        assert next(iter(stream)).text == TEXTS[0]
        stream.close()  # type: ignore[attr-defined]
        assert elsewhere[0].ended.wait(AT_MOST_S)


async def test_a_blocking_client_works_inside_a_running_loop(elsewhere: tuple[Router, str]) -> None:
    with BlockingPrefillClient(elsewhere[1]) as prefill:
        assert prefill.status().num_blocks == 9
    async with PrefillClient(elsewhere[1]) as client:
        assert (await client.status()).num_blocks == 9, "and the running loop's own clients next to it"


def test_a_blocking_client_serves_several_threads(elsewhere: tuple[Router, str]) -> None:
    found: list[str] = []

    def ask(router: BlockingRouterClient) -> None:
        found.append("".join(message.text for message in router.generate("tale", Sampling(max_tokens=9))))

    with BlockingRouterClient(elsewhere[1]) as router:
        threads = [threading.Thread(target=ask, args=(router,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(AT_MOST_S)
    assert found == ["".join(TEXTS)] * 4


def test_closing_ends_the_thread_and_later_calls_say_so(elsewhere: tuple[Router, str]) -> None:
    before = threading.active_count()
    router = BlockingRouterClient(elsewhere[1])
    stream = router.generate("for ever", Sampling(max_tokens=9))
    next(iter(stream))
    router.close()
    router.close()
    assert threading.active_count() == before
    with pytest.raises(InvalidRequest, match="closed"):
        router.status()


def test_a_blocking_form_keeps_signature_and_documentation() -> None:
    for wrapped, method in (
        (BlockingRouterClient.generate, RouterClient.generate),
        (BlockingPrefillClient.prefill, PrefillClient.prefill),
    ):
        assert wrapped.__doc__ == method.__doc__
        assert _parameters(wrapped) == _parameters(method)


def _parameters(call: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(call).parameters)


def test_errors_of_a_blocking_call_are_ours() -> None:
    with BlockingRouterClient("127.0.0.1:1") as router, pytest.raises(Unavailable):
        router.status(timeout_s=AT_MOST_S)
