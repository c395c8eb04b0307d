"""RouterService: gRPC in front of `antefix_router.generation`. Protobuf stops here."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import grpc

from antefix import rpc
from antefix.block import CPU_FLOAT32, as_tokens, check_arithmetic, exactness_of
from antefix.clients import Tokens, usage_to_wire
from antefix.config import require, setting
from antefix.errors import FingerprintMismatch
from antefix.events.address import check_url
from antefix.generation_request import Caller, GenerationRequest
from antefix.layout import KVFormat
from antefix.model_dir import ModelIdentity, identify
from antefix.registration import Registration
from antefix.secret import Keyring
from antefix.store.api import Store
from antefix.store.open_store import StoreAddress, open_store
from antefix.tokenizer import Tokenizer, load_tokenizer
from antefix.v1 import router_pb2, router_pb2_grpc, usage_pb2, usage_pb2_grpc
from antefix.wire import logprobs_to_wire, report_to_wire, sampling_from_wire, tokens_from_wire, tokens_to_wire
from antefix_router.front import Front, open_front
from antefix_router.gateway.app import start_http
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.generation import Generator
from antefix_router.keeper import BreakpointPins
from antefix_router.naming import Names
from antefix_router.placement.directory import Directory
from antefix_router.placement.leases import Leases
from antefix_router.placement.memory_feed import MemoryFeed
from antefix_router.placement.policy import COMPUTE_WEIGHT, POLICIES, make_policy
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.store_feed import StoreFeed
from antefix_router.placement.workers import Role, Workers
from antefix_router.prefilling import Limits, Prefilling
from antefix_router.usage_service import UsageServicer
from antefix_router.workers_arithmetic import Said, difference, learn

log = logging.getLogger("antefix_router")

# A caller without a deadline gets this one; nothing runs for ever.
REQUEST_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig(GatewayConfig):
    """Settings of a router."""

    address: str = setting("127.0.0.1:0", "host:port to listen on; port 0 takes a free one")
    model: str = setting("", "model directory: config.json, tokenizer (weights are hashed, never loaded)")
    kv_format: str = setting("fp8", "precision of KV: fp8 or float32; must be the workers'")
    namespace: str = setting("default", "requests share KV within a namespace only")
    bounded_windows: int = setting(0, "as the workers have it: the namespace's KV may come from approximate replays")
    arithmetic: str = setting("", "what the workers compute, as `antefix doctor` names it; empty: they are asked")
    secret_file: str = setting("", "file with the deployment's secret, which block hashes are keyed with")
    store_address: str = setting("", "host:port of the kvstore service")
    store_dir: str = setting("", "the store's directory, when it is on this host: lookups need no call")
    prefill_tokens_min: int = setting(
        -1, "an uncached rest of at most this is left to decode; -1: measured speeds decide", unit="tokens"
    )
    ttft_s_max: float = setting(
        600.0, "refuse, with a retry hint, what would wait longer for its first token", unit="s"
    )
    store_events: bool = setting(False, "follow the store's events instead of asking it at every request")
    events_redis: str = setting("", "redis:// URL that workers and store tell events to; empty: each of them is asked")
    policy: str = setting("least_work", "placement: least_work, or round_robin to measure it against")
    compute_weight: float = setting(
        COMPUTE_WEIGHT, "least_work without a store: waiting that computing a token again is worth, in tokens"
    )
    prefill: tuple[str, ...] = setting((), "addresses of prefill workers, separated by commas")
    decode: tuple[str, ...] = setting((), "addresses of decode workers, separated by commas")
    leases: bool = setting(False, "start without workers: they register themselves")

    def __post_init__(self) -> None:
        # No zero-argument super(): a slotted dataclass is a new class, and `__class__` would still be the old one.
        GatewayConfig.__post_init__(self)
        if self.arithmetic:
            check_arithmetic(self.arithmetic)
        require(bool(self.model), "--model is needed: a directory with config.json and a tokenizer")
        require(self.kv_format in ("fp8", "float32"), f"kv_format must be fp8 or float32, is {self.kv_format!r}")
        require(bool(self.secret_file), "--secret-file is needed: block hashes are keyed with the secret in it")
        require(bool(self.store_address), "--store-address is needed: host:port of the kvstore service")
        require(self.prefill_tokens_min >= -1, f"prefill_tokens_min must be at least -1, is {self.prefill_tokens_min}")
        require(self.ttft_s_max > 0, f"ttft_s_max must be positive, is {self.ttft_s_max}")
        check_url(self.events_redis)
        require(self.policy in POLICIES, f"policy must be one of {', '.join(POLICIES)}, is {self.policy!r}")
        require(self.compute_weight >= 0, f"compute_weight must not be negative, is {self.compute_weight}")
        require(bool(self.decode) or self.leases, "--decode or --leases is needed: workers named, or that register")


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """The calls that applications make."""

    def __init__(self, identity: ModelIdentity, tokenizer: Tokenizer, store: Store, config: RouterConfig) -> None:
        self._identity = identity
        self._tokenizer = tokenizer
        self._config = config
        # Without workers nothing is named; the first that is there says what goes into names.
        self._arithmetic = config.arithmetic or CPU_FLOAT32
        self._fingerprint = self._fingerprint_of(self._arithmetic)
        weight = config.compute_weight
        self._prefill = Workers(Role.PREFILL, make_policy(config.policy, compute_weight=weight), config.prefill)
        self._decode = Workers(Role.DECODE, make_policy(config.policy, compute_weight=weight), config.decode)
        keyring = Keyring.from_file(config.secret_file)
        self._names = names = Names(
            fingerprint=self._fingerprint,
            keyring=keyring,
            block_size=identity.geometry.block_size,
            replay_tokens=identity.geometry.replay_tokens,
        )
        directory, sessions = Directory(), Sessions()
        self.feed = StoreFeed(
            store.watch,
            fingerprint=self._fingerprint,
            redis_url=config.events_redis if config.store_events else "",
            name=config.store_address,
        )
        self._prefilling = prefilling = Prefilling(
            self._prefill,
            store,
            directory,
            fingerprint=self._fingerprint,
            limits=Limits(prefill_tokens_min=config.prefill_tokens_min, ttft_s_max=config.ttft_s_max),
            num_decoding=self._decode.num_running_least,
            sessions=sessions,
            feed=self.feed if config.store_events else None,
        )
        self._counters = prefilling.counters
        self._keyring = keyring
        self.memory = MemoryFeed(directory, redis_url=config.events_redis)
        self.leases = Leases(self._prefill, self._decode, directory, fingerprint=self._fingerprint, memory=self.memory)
        self.pins = BreakpointPins(store)
        self.front: Front = open_front(
            config,
            Generator(prefilling, self._decode, names, directory, self.pins, sessions),
            identity=identity,
            tokenizer=tokenizer,
            keyring=keyring,
            fingerprint=self._fingerprint,
        )

    def _fingerprint_of(self, arithmetic: str) -> bytes:
        config = self._config
        return self._identity.fingerprint(
            KVFormat(config.kv_format),
            namespace=config.namespace,
            exactness=exactness_of(config.bounded_windows),
            arithmetic=arithmetic,
        ).digest

    async def learn(self) -> None:
        """Ask the workers that the settings name what they compute.  Raises:  ConfigError: they differ."""
        workers = [*self._prefill.workers, *self._decode.workers]
        if workers and not self._config.arithmetic:
            self._adopt(await learn(workers))

    def _adopt(self, arithmetic: str) -> None:
        """Name everything by this from now on."""
        log.info("workers compute %s", arithmetic)
        self._arithmetic, self._fingerprint = arithmetic, self._fingerprint_of(arithmetic)
        self._names.fingerprint = self._prefilling.fingerprint = self.leases.fingerprint = self._fingerprint
        self.feed.rename(self._fingerprint)
        accounts = self.front.accounts
        accounts.served = replace(accounts.served, fingerprint=self._fingerprint.hex())

    def _check_arithmetic(self, request: router_pb2.RegisterWorkerRequest) -> None:
        """The first worker says what a router computes with that was not told; others must say the same.

        Raises:  FingerprintMismatch: this one computes something else.
        """
        if not request.arithmetic or not request.ttl_s or request.arithmetic == self._arithmetic:
            return
        others = [*self._prefill.workers, *self._decode.workers]
        is_ours = request.fingerprint == self._fingerprint_of(request.arithmetic)
        if is_ours and not others and not self._config.arithmetic:
            self._adopt(request.arithmetic)
        elif is_ours:
            known = next((worker for worker in others if worker.arithmetic), None)
            who = f"{known.role} worker {known.address}" if known else "this router's --arithmetic"
            here = Said(who=who, arithmetic=self._arithmetic, setup=known.setup if known else "a setting")
            who = f"{request.role} worker {request.address}"
            raise FingerprintMismatch(
                difference(here, Said(who=who, arithmetic=request.arithmetic, setup=request.setup))
            )

    async def Generate(
        self, message: router_pb2.GenerateRequest, context: rpc.Context
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        caller = Caller(
            tenant=message.tenant, user=message.user, request_id=message.request_id, session=message.session
        )
        request = GenerationRequest(
            tokens=await self._tokens(message),
            sampling=sampling_from_wire(message.sampling),
            caller=caller,
            num_samples=message.num_samples or 1,
        )
        bill = await self.front.admit(request)
        generation = bill.generation
        texts = [self._tokenizer.stream() for _ in generation.samples]
        num_sent = [0 for _ in generation.samples]
        outputs = self.front.run(bill, rpc.deadline_s(context, REQUEST_TIMEOUT_S))
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
                usage=usage_to_wire(bill.usage()) if index == last else None,
                restore=report_to_wire(generation.restore) if generation.restore and index == last else None,
            )

    async def _tokens(self, message: router_pb2.GenerateRequest) -> Tokens:
        if message.WhichOneof("prompt") == "tokens":
            return tokens_from_wire(message.tokens)
        text: str = message.text
        return await self.front.encoding.run(len(text), lambda: as_tokens(self._tokenizer.encode(text)))

    async def RouterStatus(
        self, request: router_pb2.RouterStatusRequest, context: rpc.Context
    ) -> router_pb2.RouterStatusResponse:
        response = router_pb2.RouterStatusResponse(
            model=self._identity.name,
            fingerprint=self._fingerprint,
            block_size=self._identity.geometry.block_size,
            arithmetic=self._arithmetic,
        )
        for workers in (self._prefill, self._decode):
            for worker in workers.workers:
                response.workers.add(
                    address=worker.address,
                    role=worker.role.value,
                    serving=not worker.is_shunned(time.monotonic()),
                    num_requests=worker.num_requests,
                    num_tokens_queued=worker.num_tokens,
                    draining=worker.draining,
                    memory_known=self.memory.in_step(worker.address),
                    arithmetic=worker.arithmetic,
                    setup=worker.setup,
                )
        counters = self._counters
        response.counters.led = counters.num_led
        response.counters.followed = counters.num_followed
        response.counters.gave_up_waiting = counters.num_gave_up_waiting
        response.counters.refused = counters.num_refused
        response.counters.straight = counters.num_straight
        told = self.memory.counters
        response.counters.memory_events = told.num_events
        response.counters.memory_gaps = told.num_gaps
        response.counters.memory_snapshots = told.num_snapshots
        response.counters.unstored = self.front.accounts.num_unstored
        response.counters.unstored_reason = self.front.accounts.unstored_reason
        response.num_running = self.front.accounts.num_running
        for name, value in dataclasses.asdict(self.front.accounts.retries.counts()).items():
            setattr(response.answers, name, value)
        return response

    async def RegisterWorker(
        self, request: router_pb2.RegisterWorkerRequest, context: rpc.Context
    ) -> router_pb2.RegisterWorkerResponse:
        Registration(
            role=request.role,
            address=request.address,
            fingerprint=request.fingerprint,
            instance=request.instance,
            ttl_s=request.ttl_s,
            said_at_ms=request.said_at_ms,
        ).check(self._keyring, request.proof)
        self._check_arithmetic(request)
        self.leases.renew(
            request.role,
            request.address,
            instance=request.instance,
            fingerprint=request.fingerprint,
            ttl_s=request.ttl_s,
            arithmetic=request.arithmetic,
            setup=request.setup,
        )
        return router_pb2.RegisterWorkerResponse()


async def run(config: RouterConfig, *, watch_stdin: bool = False) -> None:
    """Serve until told to stop.

    Raises:  ModelError, ConfigError: the model directory or a setting is not usable.
    """
    store = open_store(StoreAddress(address=config.store_address, directory=config.store_dir))
    servicer = RouterServicer(identify(config.model), load_tokenizer(config.model), store, config)

    def register(server: grpc.aio.Server) -> None:
        router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)
        usage_pb2_grpc.add_UsageServiceServicer_to_server(UsageServicer(servicer.front), server)

    await servicer.learn()
    http = await start_http(servicer.front, config) if config.http_address else None

    accounts = servicer.front.accounts

    async def leave() -> None:
        accounts.retries.drain()

    async def stop() -> None:
        await servicer.front.close()
        await servicer.leases.close()
        await servicer.feed.close()
        await servicer.pins.close()
        await store.close()

    server = await rpc.start_server(config.address, register, [router_pb2.DESCRIPTOR, usage_pb2.DESCRIPTOR])
    servicer.leases.start()
    if config.store_events:
        servicer.feed.start()
    http_address = http.address if http is not None else ""
    await rpc.run_until_signal(
        server,
        role="router",
        stop=stop,
        watch_stdin=watch_stdin,
        http_address=http_address,
        leave=leave,
        grace_s=config.grace_s,
        others=[http.stop] if http is not None else [],
        end=accounts.ending.end,
    )
