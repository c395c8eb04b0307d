"""At the end of the grace period, running requests end with an error in their API's shape, and their records say so."""

import asyncio
import contextlib
import json

import grpc
import pytest

from antefix import rpc
from antefix.block import as_tokens
from antefix.clients import RouterClient
from antefix.errors import Draining
from antefix.generation_request import GenerationRequest
from antefix.sampling import Sampling
from antefix.v1 import router_pb2, router_pb2_grpc
from antefix.wire import tokens_to_wire
from antefix_billing.ledger_files import read_settled
from antefix_billing.usage_record import Status
from antefix_router.answers import RetryConfig
from antefix_router.gateway.app import start_http
from antefix_router.gateway.gateway_config import GatewayConfig
from tests.gateway.scripted import Script, make_front
from tests.gateway.test_retries import BODIES, MODEL
from tests.waiting import AT_MOST_S, until

httpx2 = pytest.importorskip("httpx2")


def records(directory):
    return [item.record for item in read_settled(directory / "ledger")]


@contextlib.asynccontextmanager
async def asking(tmp_path, path, *, stream, key="", **script):
    """A request in the middle of its answer: (front, gateway, the task of its answer)."""
    running = Script(say=lambda prompt: "x" * 40, pause_s=0.5, **script)
    front = make_front(running, ledger=tmp_path / "ledger", retries=RetryConfig())
    http = await start_http(front, GatewayConfig(http_address="127.0.0.1:0"))
    body = {"model": MODEL, "stream": stream, **BODIES[path]}
    async with httpx2.AsyncClient(base_url=f"http://{http.address}", timeout=AT_MOST_S) as client:
        headers = {"idempotency-key": key} if key else {}
        asked = asyncio.create_task(client.post(path, json=body, headers=headers))
        await until(lambda: running.requests and (running.hold or running.generations[0].samples[0].emitted))
        yield front, http, asked
        await front.accounts.close()


@pytest.mark.parametrize("key", ["", "k"])
@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_that_outlives_the_grace_period_ends_with_an_error_event(tmp_path, path, key):
    async with asking(tmp_path, path, stream=True, key=key) as (front, http, asked):
        front.accounts.retries.drain()
        stopping = asyncio.create_task(http.stop())
        await asyncio.sleep(0.1)
        # Draining does not stop the request, but the end of the grace period does.
        assert not asked.done()
        front.accounts.ending.end()
        answer = await asked
        await stopping
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    if path == "/v1/messages":
        assert events[-1]["type"] == "error" and events[-1]["error"]["type"] == "overloaded_error"
    elif path == "/v1/responses":
        assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    else:
        assert events[-1]["error"]["code"] == "service_unavailable"
    assert "grace period" in answer.text
    (record,) = records(tmp_path)
    assert (record.status, record.detail) == (Status.FAILED, "Draining") and record.output_tokens > 0


@pytest.mark.parametrize("hold", [True, False])
async def test_a_whole_answer_that_outlives_the_grace_period_is_an_error_and_costs_nothing(tmp_path, hold):
    held = {"hold": asyncio.Event()} if hold else {}
    async with asking(tmp_path, "/v1/messages", stream=False, **held) as (front, http, asked):
        front.accounts.ending.end()
        answer = await asked
        await http.stop()
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded_error")
    (record,) = records(tmp_path)
    assert (record.status, record.detail, record.output_tokens, record.price) == (Status.FAILED, "Draining", 0, 0)


async def test_an_answer_without_a_client_is_given_up_when_nobody_can_come_for_it(tmp_path):
    async with asking(tmp_path, "/v1/completions", stream=False, key="k") as (front, http, asked):
        asked.cancel()
        await until(lambda: front.accounts.retries.counts().unattended == 1)
        front.accounts.retries.drain()
        await http.stop()
    (record,) = records(tmp_path)
    assert (record.status, record.output_tokens) == (Status.CANCELLED, 0)


async def test_a_grpc_stream_that_outlives_the_grace_period_ends_with_a_status(tmp_path):
    front = make_front(Script(say=lambda prompt: "x" * 40, pause_s=0.5), ledger=tmp_path / "ledger")

    class Servicer(router_pb2_grpc.RouterServiceServicer):
        async def Generate(self, message, context: grpc.aio.ServicerContext):
            bill = await front.admit(GenerationRequest(tokens=rpc_tokens(message), sampling=Sampling(max_tokens=50)))
            async with contextlib.aclosing(front.run(bill, 10.0)) as outputs:
                async for piece in outputs:
                    yield router_pb2.GenerateResponse(tokens=tokens_to_wire(piece.tokens))

    server = await rpc.start_server(
        "127.0.0.1:0",
        lambda target: router_pb2_grpc.add_RouterServiceServicer_to_server(Servicer(), target),
        [router_pb2.DESCRIPTOR],
    )
    answers = RouterClient(server.address).generate("abc", Sampling(max_tokens=50), timeout_s=AT_MOST_S)
    await anext(answers)
    front.accounts.ending.end()
    with pytest.raises(Draining, match="grace period"):
        await anext(answers)
    await server.drain(0)
    await front.accounts.close()
    assert records(tmp_path)[0].detail == "Draining"


def rpc_tokens(message):
    return as_tokens(list(message.text.encode()))


async def test_what_asks_after_the_end_is_refused(tmp_path):
    front = make_front(Script(), ledger=tmp_path / "ledger")
    bill = await front.admit(GenerationRequest(tokens=as_tokens([1]), sampling=Sampling(max_tokens=5)))
    front.accounts.ending.end()
    with pytest.raises(Draining):
        await anext(front.run(bill, 10.0))
    await front.accounts.close()
