"""FleetService and UsageService: the gRPC interface of `fleet_router`, for operators. Protobuf stops here."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import grpc

from antefix import rpc
from antefix.checked_files import parse_json
from antefix.errors import InvalidRequest
from antefix.secret import Keyring, create_secret_file
from antefix.security.identity import Role
from antefix.security.process_security import open_security
from antefix.telemetry import Registry
from antefix.telemetry.settings import serve_metrics
from antefix.v1 import fleet_pb2, fleet_pb2_grpc, usage_pb2, usage_pb2_grpc
from antefix_billing.api_keys import Scope
from antefix_router.fleet.engines import Engine, engine_of
from antefix_router.fleet.fleet_config import FleetConfig
from antefix_router.fleet.fleet_door import PATHS, build_fleet_app
from antefix_router.fleet.fleet_placing import Candidate
from antefix_router.fleet.fleet_router import FleetRouter
from antefix_router.fleet.fleet_view import FleetView
from antefix_router.fleet.passed_call import CHAT, COMPLETIONS
from antefix_router.gateway.access import HttpMeasures
from antefix_router.gateway.app import HEALTH_PATHS, serve_door
from antefix_router.gateway.gateway import HttpCaller
from antefix_router.gateway.http_errors import PassedError
from antefix_router.key_callers import caller_of_key
from antefix_router.page.page import page_routes
from antefix_router.readiness import why_unready
from antefix_router.usage_service import UsageServicer


class FleetServicer(fleet_pb2_grpc.FleetServiceServicer):
    """The calls for operators."""

    def __init__(self, router: FleetRouter) -> None:
        self._router = router

    async def FleetStatus(
        self, request: fleet_pb2.FleetStatusRequest, context: rpc.Context
    ) -> fleet_pb2.FleetStatusResponse:
        return fleet_pb2.FleetStatusResponse(engines=[self._status(engine) for engine in self._router.engines.engines])

    async def ExplainRequest(
        self, request: fleet_pb2.ExplainRequestRequest, context: rpc.Context
    ) -> fleet_pb2.ExplainRequestResponse:
        router = self._router
        body = parse_json(request.body, "the body")
        if not isinstance(body, dict):
            raise InvalidRequest("the body must be a JSON object")
        # A caller that may use this call may ask about any tenant.
        caller = HttpCaller(tenant=request.tenant, session=request.session)
        try:
            call = await router.door.call(CHAT if "messages" in body else COMPLETIONS, body, caller)
        except PassedError as err:
            raise InvalidRequest(f"the worker refused the request: {err}") from err
        prompts = router.placing.named(call)
        placed = router.placing.place(call, prompts, (caller.cache_tenant, caller.session), frozenset())
        known = placed.expected
        return fleet_pb2.ExplainRequestResponse(
            model=call.model,
            prompt_tokens=0 if call.tokens is None else len(call.tokens),
            candidates=[self._candidate(each) for each in placed.candidates],
            chosen=placed.worker.address,
            miss_reason=known.miss_reason(known.here).value,
            first_missed_token=known.here,
        )

    def _candidate(self, candidate: Candidate) -> fleet_pb2.CandidateEngine:
        return fleet_pb2.CandidateEngine(
            engine=self._status(engine_of(candidate.worker)),
            hit_tokens=candidate.here,
            leading_tokens=candidate.leading,
            media=[fleet_pb2.MediumTokens(medium=name, tokens=num) for name, num in candidate.media],
        )

    def _status(self, engine: Engine) -> fleet_pb2.EngineStatus:
        worker = self._router.workers.find(engine.place.address)
        assert worker is not None
        return fleet_pb2.EngineStatus(
            worker=engine.place.address,
            up=engine.is_up,
            models=[model.name for model in engine.models],
            knowledge="guess" if engine.subscriber is None else "events" if engine.tells else "behind",
            block_size=self._router.engines.block_size(engine),
            blocks=len(engine.index),
            requests=worker.num_requests,
            pending_tokens=round(worker.backlog.pending_tokens(time.monotonic())),
            expected_hit_tokens=engine.hits.expected,
            reported_hit_tokens=engine.hits.reported,
            lost_hit_tokens=engine.hits.lost,
        )


async def run(config: FleetConfig, *, watch_stdin: bool = False) -> None:
    """Serve until told to stop.  Raises:  ConfigError: one of the settings cannot be used."""
    keyring = Keyring.from_file(create_secret_file(Path(config.secret_file)))
    security = open_security(
        Role.ROUTER,
        config.credentials,
        keyring=keyring,
        tokens=lambda key, method: caller_of_key(router.front.keys, key, method),
        needs_token=lambda: router.front.keys.open_as is None,
    )
    security.use()
    router = FleetRouter(config, keyring)
    servicer = FleetServicer(router)

    def register(server: grpc.aio.Server) -> None:
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(servicer, server)
        usage_pb2_grpc.add_UsageServiceServicer_to_server(UsageServicer(router.front), server)

    await router.start()
    router.door.why_unready = lambda: why_unready(router.front.accounts, router.workers)
    measures = HttpMeasures([*PATHS, "/v1/models", *HEALTH_PATHS])
    view = FleetView(router, router.front.accounts.activity)
    page = page_routes(view, lambda request: router.door.holder(request, Scope.ADMIN))
    app = build_fleet_app(router.door, config, measures, page)
    http = await serve_door(router.door, app, config, measures, security)
    accounts = router.front.accounts

    async def leave() -> None:
        accounts.retries.drain()

    server = await rpc.start_server(
        config.address, register, [fleet_pb2.DESCRIPTOR, usage_pb2.DESCRIPTOR], security=security
    )
    registry = Registry("fleet")
    registry.add_in_loop(router.metrics)
    registry.add_in_loop(http.metrics)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, router.live_books.ask)
    await rpc.run_until_signal(
        server,
        role="fleet",
        stop=router.close,
        watch_stdin=watch_stdin,
        http_address=http.address,
        metrics_address=serve_metrics(config, registry, security),
        leave=leave,
        grace_s=config.grace_s,
        others=[http.stop],
        end=accounts.ending.end,
    )
