"""What health says while a role is stopped (SIGSTOP), and soon: ready means that a request would be served."""

import time

import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from antefix import rpc
from antefix.errors import AntefixError
from tests.e2e.test_hangs import stopped
from tests.waiting import AT_MOST_S, until

pytestmark = [pytest.mark.services, pytest.mark.impatient]

# Ten times the 2 s within which a silence is noticed.
SOON_S = 20.0
SERVICE = "antefix.v1.RouterService"


async def grpc_health(process, service="", timeout_s=AT_MOST_S):
    """The name of the status that a process says of a service; "" if it does not answer."""
    async with rpc.channel(process.address) as channel:
        try:
            with rpc.rpc_errors():
                request = health_pb2.HealthCheckRequest(service=service)
                answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except AntefixError:
            return ""
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def test_health_says_soon_which_stopped_role_stops_requests(deploy, small_model):
    async with deploy(model=small_model, http_address="127.0.0.1:0") as deployment:
        router = deployment.one("router")
        async with httpx2.AsyncClient(base_url=f"http://{router.http_address}", timeout=AT_MOST_S) as client:

            async def says(status, reason, grpc):
                answer = await client.get("/readyz")
                found = answer.status_code, answer.json().get("reason", ""), await grpc_health(router, SERVICE)
                return found == (status, reason, grpc)

            async def is_alive():
                return (await client.get("/livez")).status_code == 200 and await grpc_health(router) == "SERVING"

            async def soon(*wanted):
                begun = time.monotonic()
                await until(lambda: says(*wanted), f"health says {wanted}")
                assert time.monotonic() - begun < SOON_S and await is_alive()

            ready = 200, "", "SERVING"
            await soon(*ready)
            # No request can be served without a decode worker.
            with stopped(deployment.one("decode")):
                await soon(503, "no decode worker answers", "NOT_SERVING")
            await soon(*ready)
            # Without the others, requests are served, but more slowly.
            for role in ("prefill", "kvstore"):
                with stopped(deployment.one(role)):
                    assert await grpc_health(deployment.one(role), timeout_s=0.5) == ""
                    await soon(*ready)
            # A stopped router says nothing, and its workers and store are healthy.
            with stopped(router):
                assert await grpc_health(router, timeout_s=0.5) == ""
                with pytest.raises(httpx2.TimeoutException):
                    await client.get("/readyz", timeout=0.5)
                for role in ("prefill", "decode", "kvstore"):
                    assert await grpc_health(deployment.one(role)) == "SERVING", role
            await soon(*ready)
