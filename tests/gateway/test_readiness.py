"""Liveness and readiness differ: a ready router would serve a request."""

import asyncio

import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from antefix import rpc
from antefix.v1 import router_pb2
from antefix_billing import usage_commit
from antefix_router.gateway.app import start_http
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.placement.policy import make_policy
from antefix_router.placement.workers import WorkerRole, Workers
from antefix_router.readiness import tell_readiness, why_unready
from tests.gateway.scripted import Script, make_front
from tests.waiting import AT_MOST_S, until


class Pulse:
    def __init__(self, answers):
        self.answers, self.is_silent = answers, answers is False


def decoders(*answers):
    workers = Workers(
        WorkerRole.DECODE, make_policy("least_work"), [f"127.0.0.1:{7201 + i}" for i, _ in enumerate(answers)]
    )
    for worker, answer in zip(workers.workers, answers, strict=True):
        worker.pulse = Pulse(answer)
    return workers


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ((True,), ""),
        ((None,), ""),
        ((False, True), ""),
        ((False,), "no decode worker answers"),
        ((False, False), "no decode worker answers"),
        ((), "no decode worker is known"),
    ],
)
def test_a_router_needs_a_decode_worker_that_answers(answers, reason):
    front = make_front(Script(), ledger=None)
    assert why_unready(front.accounts, decoders(*answers)) == reason


def test_a_draining_worker_does_not_make_the_router_ready():
    workers = decoders(True)
    workers.workers[0].draining = True
    assert "answers" in why_unready(make_front(Script(), ledger=None).accounts, workers)


async def test_a_ledger_that_cannot_be_written_shows_for_a_while(tmp_path, monkeypatch):
    front = make_front(Script(), ledger=tmp_path / "ledger")
    accounts, workers = front.accounts, decoders(True)
    append = accounts.ledger.append

    def full(items):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accounts.ledger, "append", full)
    entry = accounts.records.opened(make_request(), accounts.served)[1]
    with pytest.raises(OSError, match="No space"):
        await accounts.writer.open(entry)
    assert why_unready(accounts, workers) == "the ledger cannot be written"
    monkeypatch.setattr(usage_commit, "FAILING_S", 0.0)
    assert why_unready(accounts, workers) == "", "the next request shows whether it still is so"
    monkeypatch.setattr(usage_commit, "FAILING_S", 100.0)
    monkeypatch.setattr(accounts.ledger, "append", append)
    await accounts.writer.open(entry)
    assert why_unready(accounts, workers) == ""
    await front.close()


def make_request():
    import numpy as np

    from antefix.generation_request import Caller, GenerationRequest
    from antefix.sampling import Sampling

    return GenerationRequest(
        tokens=np.arange(4, dtype=np.uint32), sampling=Sampling(max_tokens=1), caller=Caller(tenant="t", request_id="r")
    )


async def test_http_says_both_and_healthz_means_ready():
    front, why = make_front(Script(), ledger=None), ["no decode worker answers"]
    http = await start_http(front, GatewayConfig(http_address="127.0.0.1:0"), why_unready=lambda: why[0])
    try:
        async with httpx2.AsyncClient(base_url=f"http://{http.address}", timeout=AT_MOST_S) as client:
            for reason, status in (("no decode worker answers", 503), ("", 200)):
                why[0] = reason
                assert (await client.get("/livez")).status_code == 200
                for path in ("/readyz", "/healthz"):
                    answer = await client.get(path)
                    assert answer.status_code == status and answer.json().get("reason", "") == reason
    finally:
        await http.stop()
        await front.close()


async def test_grpc_health_says_so_by_service_and_the_server_lives(monkeypatch):
    monkeypatch.setattr("antefix_router.readiness._EVERY_S", 0.01)
    server, why = await rpc.start_server("127.0.0.1:0", lambda _: None, [router_pb2.DESCRIPTOR]), ["not yet"]
    telling = asyncio.create_task(tell_readiness(server, ["antefix.v1.RouterService"], lambda: why[0]))
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    try:
        async with rpc.channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for reason, wanted in (("not yet", not_serving), ("", serving), ("again", not_serving)):
                why[0] = reason

                async def says(wanted=wanted):
                    request = health_pb2.HealthCheckRequest(service="antefix.v1.RouterService")
                    return (await health.Check(request)).status == wanted

                await until(says, f"readiness is told: {reason!r}")
                assert (await health.Check(health_pb2.HealthCheckRequest())).status == serving
    finally:
        telling.cancel()
        await server.drain(0)
