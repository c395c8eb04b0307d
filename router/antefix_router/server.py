"""RouterService: gRPC in front of `antefix_router.assembly`. Protobuf stops here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial

import grpc
from starlette.routing import Route

from antefix import rpc
from antefix.block import as_tokens
from antefix.clients import Tokens
from antefix.discovery.finders import called_names
from antefix.end_tasks import end_tasks
from antefix.events.event_seal import EventKeys
from antefix.generation_request import Caller, GenerationRequest
from antefix.keep_running import keep_running
from antefix.model_dir import identify
from antefix.outward import outward
from antefix.redis_access import RedisAccess
from antefix.registration import Registration
from antefix.secret import Keyring
from antefix.security.guard import admitted
from antefix.security.identity import Role
from antefix.security.process_security import ProcessSecurity, open_security
from antefix.store.feed_room import FeedRoom
from antefix.store.local_store import LocalStore
from antefix.store.many_stores import ManyStores
from antefix.store.object_access import object_tiers
from antefix.store.open_store import StoreAddress, feed_maker, open_stores, store_addresses, store_sources
from antefix.store.remote_store import RemoteStore
from antefix.telemetry import Registry, bind_request, span
from antefix.telemetry.settings import serve_metrics
from antefix.tokenizer import load_tokenizer
from antefix.v1 import router_pb2, router_pb2_grpc, usage_pb2, usage_pb2_grpc
from antefix.wire import (
    logprobs_to_wire,
    report_to_wire,
    sampling_from_wire,
    tokens_from_wire,
    tokens_to_wire,
    usage_to_wire,
)
from antefix_billing.api_keys import Scope
from antefix_billing.key_register import KeyRegister
from antefix_router.assembly import Router
from antefix_router.gateway.app import HttpServer, start_http
from antefix_router.gateway.gateway import Gateway
from antefix_router.key_callers import caller_of_key
from antefix_router.open_bill import Bill
from antefix_router.page.page import page_routes
from antefix_router.page.view import View
from antefix_router.readiness import tell_readiness
from antefix_router.router_config import RouterConfig
from antefix_router.usage_service import UsageServicer

# A caller without a deadline gets this one, so that nothing runs without end.
REQUEST_TIMEOUT_S = 3600.0


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """The calls that applications and workers make."""

    def __init__(self, router: Router) -> None:
        self.router = router

    async def Generate(
        self, message: router_pb2.GenerateRequest, context: rpc.Context
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        tenant = admitted().identity.tenant(message.tenant)
        shedding = self.router.front.shedding
        with outward(), shedding.waiting(tenant, may_refuse=not message.request_id):
            async with contextlib.aclosing(self._generate(message, context, tenant)) as responses:
                async for response in responses:
                    yield response

    async def _generate(
        self, message: router_pb2.GenerateRequest, context: rpc.Context, tenant: str
    ) -> AsyncGenerator[router_pb2.GenerateResponse, None]:
        caller = Caller(
            tenant=tenant,
            user=message.user,
            request_id=message.request_id,
            session=message.session,
            key_id=admitted().identity.key_id,
        )
        request = GenerationRequest(
            tokens=await self._tokens(message, tenant),
            sampling=sampling_from_wire(message.sampling),
            caller=caller,
            num_samples=message.num_samples or 1,
        )
        bill = await self.router.front.admit(request)
        generation = bill.generation
        bind_request(generation.request.request_id)
        texts = [self.router.tokenizer.stream() for _ in generation.samples]
        num_sent = [0 for _ in generation.samples]
        outputs = self.router.front.run(bill, rpc.deadline_s(context, REQUEST_TIMEOUT_S))
        async with contextlib.aclosing(outputs):
            async for index, tokens in outputs:
                num_before, num_sent[index] = num_sent[index], num_sent[index] + len(tokens)
                yield router_pb2.GenerateResponse(
                    sample=index,
                    tokens=tokens_to_wire(tokens),
                    text=texts[index].push([int(token) for token in tokens]),
                    logprobs=logprobs_to_wire(generation.samples[index].logprobs[num_before : num_sent[index]]),
                )
        last = len(texts) - 1
        for index, (text, sample) in enumerate(zip(texts, generation.samples, strict=True)):
            yield router_pb2.GenerateResponse(
                sample=index,
                text=text.finish(),
                finish_reason=sample.finish_reason,
                usage=_usage_of(bill) if index == last else None,
                restore=report_to_wire(generation.restore) if generation.restore and index == last else None,
            )

    async def _tokens(self, message: router_pb2.GenerateRequest, tenant: str) -> Tokens:
        if message.WhichOneof("prompt") == "tokens":
            return tokens_from_wire(message.tokens)
        text: str = message.text
        self.router.front.check_text(len(text))
        with span("tokenize", num_characters=len(text)):
            return await self.router.front.encoding.run(
                len(text), lambda: as_tokens(self.router.tokenizer.encode(text)), tenant=tenant
            )

    async def RouterStatus(
        self, request: router_pb2.RouterStatusRequest, context: rpc.Context
    ) -> router_pb2.RouterStatusResponse:
        response = router_pb2.RouterStatusResponse(
            model=self.router.identity.name,
            fingerprint=self.router.fingerprint,
            block_size=self.router.identity.geometry.block_size,
            arithmetic=self.router.arithmetic,
        )
        for workers in (self.router.prefill, self.router.decode):
            for worker in workers.workers:
                response.workers.add(
                    address=worker.address,
                    role=worker.role.value,
                    serving=not worker.is_shunned(time.monotonic()),
                    num_requests=worker.num_requests,
                    num_tokens_queued=worker.num_tokens,
                    draining=worker.draining,
                    memory_known=self.router.memory.in_step(worker.address),
                    arithmetic=worker.arithmetic,
                    setup=worker.setup,
                )
        for role, address, seconds_ago in self.router.leases.lost(time.monotonic()):
            response.lost.add(role=role.value, address=address, seconds_ago=seconds_ago)
        counters = self.router.counters
        response.counters.led = counters.num_led
        response.counters.followed = counters.num_followed
        response.counters.gave_up_waiting = counters.num_gave_up_waiting
        response.counters.refused = counters.num_refused
        response.counters.straight = counters.num_straight
        told = self.router.memory.counters
        response.counters.memory_events = told.num_events
        response.counters.memory_gaps = told.num_gaps
        response.counters.memory_snapshots = told.num_snapshots
        response.counters.unstored = self.router.front.accounts.num_unstored
        response.counters.unstored_reason = self.router.front.accounts.unstored_reason
        response.num_running = self.router.front.accounts.num_running
        for name, value in dataclasses.asdict(self.router.front.accounts.retries.counts()).items():
            setattr(response.answers, name, value)
        return response

    async def RegisterWorker(
        self, request: router_pb2.RegisterWorkerRequest, context: rpc.Context
    ) -> router_pb2.RegisterWorkerResponse:
        worker = Registration(
            role=request.role,
            address=request.address,
            fingerprint=request.fingerprint,
            instance=request.instance,
            ttl_s=request.ttl_s,
            said_at_ms=request.said_at_ms,
        )
        worker.check(self.router.keyring, request.proof)
        identity = admitted().identity
        worker.check_identity(identity)
        if worker.ttl_s:
            self.router.check_arithmetic(
                worker.role,
                worker.address,
                fingerprint=worker.fingerprint,
                arithmetic=request.arithmetic,
                setup=request.setup,
            )
        self.router.leases.renew(
            request.role,
            request.address,
            instance=request.instance,
            fingerprint=request.fingerprint,
            ttl_s=request.ttl_s,
            arithmetic=request.arithmetic,
            setup=request.setup,
            block_size=request.block_size,
            name=identity.name,
        )
        return router_pb2.RegisterWorkerResponse()


def _usage_of(bill: Bill) -> usage_pb2.Usage:
    return usage_to_wire(bill.usage(), request_id=bill.record.request_id, total_s=bill.total_s)


async def run(config: RouterConfig, *, watch_stdin: bool = False) -> None:
    """Serve until told to stop.

    Raises:  ModelError, ConfigError: the model directory or a setting is not usable.
    """
    # The router holds the keys, so the security that checks them is created first and the router with it.
    security = _open_security(config, lambda: router.front.keys)
    security.use()
    router = await _open_router(config, security)
    http = await _start_http(router, security) if config.http_address else None
    server = await _start_grpc(router, security)
    router.start()
    service = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
    telling = keep_running(partial(tell_readiness, server, [service], router.why_unready), "the report of readiness")
    registry = Registry("router")
    registry.add_in_loop(router.metrics)
    if http is not None:
        registry.add_in_loop(http.metrics)

    accounts = router.front.accounts

    async def leave() -> None:
        accounts.retries.drain()

    async def stop() -> None:
        await end_tasks([telling])
        await router.close()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, router.live_books.ask)
    await rpc.run_until_signal(
        server,
        role="router",
        stop=stop,
        watch_stdin=watch_stdin,
        http_address=http.address if http is not None else "",
        metrics_address=serve_metrics(config, registry, security),
        leave=leave,
        grace_s=config.grace_s,
        others=[http.stop] if http is not None else [],
        end=accounts.ending.end,
    )


def _open_security(config: RouterConfig, keys: Callable[[], KeyRegister]) -> ProcessSecurity:
    return open_security(
        Role.ROUTER,
        config.credentials,
        keyring=Keyring.from_file(config.secret_file),
        tokens=lambda key, method: caller_of_key(keys(), key, method),
        needs_token=lambda: keys().open_as is None,
    )


async def _open_router(config: RouterConfig, security: ProcessSecurity) -> Router:
    """The router, which has asked the workers for their arithmetic, and follows no events yet."""
    stores = store_addresses(config)
    called = [where.address for where in stores]
    security.check_calling((*called, *called_names((*config.prefill, *config.decode))))
    store = _open_store(config, stores, security.check_calling_one)
    if isinstance(store, ManyStores):
        await store.start()
    identity, tokenizer = identify(config.model), load_tokenizer(config.model)
    router = Router(identity, tokenizer, store, config, granter=security.granter, may_call=security.check_calling_one)
    await router.learn()
    return router


async def _start_http(router: Router, security: ProcessSecurity) -> HttpServer:
    more, why_unready = partial(_page, router), router.why_unready
    return await start_http(router.front, router.config, security, more=more, why_unready=why_unready)


async def _start_grpc(router: Router, security: ProcessSecurity) -> rpc.Server:
    servicer, usage = RouterServicer(router), UsageServicer(router.front)

    def register(server: grpc.aio.Server) -> None:
        router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)
        usage_pb2_grpc.add_UsageServiceServicer_to_server(usage, server)

    return await rpc.start_server(
        router.config.address,
        register,
        [router_pb2.DESCRIPTOR, usage_pb2.DESCRIPTOR],
        security=security,
        token_address=router.config.token_address,
        calls=[where.address for where in store_addresses(router.config)],
    )


def _open_store(
    config: RouterConfig, stores: Sequence[StoreAddress], may_call: Callable[[str], object]
) -> ManyStores | LocalStore | RemoteStore:
    events = RedisAccess.of(config.events_redis, config) if config.events_redis else ""
    keys = EventKeys.of(Keyring.from_file(config.secret_file))
    make_feed = feed_maker(events, keys, FeedRoom(config.store_events_bytes)) if config.store_events else None
    return open_stores(
        stores,
        near=config.near_stores,
        more=object_tiers(config),
        make_feed=make_feed,
        sources=store_sources(config, keys),
        may_call=may_call,
    )


def _page(router: Router, gateway: Gateway) -> list[Route]:
    view = View(router, router.store, router.front.accounts.activity, router.forest)
    return page_routes(view, lambda request: gateway.holder(request, Scope.ADMIN))
