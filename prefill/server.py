"""PrefillService: gRPC in front of `antefix.worker.prompt`. Protobuf stops here."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from antefix import rpc
from antefix.config import require, setting
from antefix.events.redis_bus import MemoryPublisher, check_url
from antefix.store.open import StoreAddress, open_store
from antefix.v1 import memory_pb2, prefill_pb2, prefill_pb2_grpc, window_pb2
from antefix.wire import report_to_wire, tokens_from_wire
from antefix.worker.adopt import leave_handoff
from antefix.worker.engine import Engine, EngineConfig, build_engine
from antefix.worker.lease import WorkerLease
from antefix.worker.memory_service import add_memory_service
from antefix.worker.prompt import run_prompt
from antefix.worker.restore import Prompt
from antefix.worker.window_service import add_window_service
from prefill.queue import PrefillQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig(EngineConfig):
    """Settings of a prefill worker."""

    address: str = setting("127.0.0.1:0", "host:port to listen on; port 0 takes a free one")
    store_address: str = setting("", "host:port of the kvstore service")
    store_dir: str = setting("", "the store's directory, when it is on this host: payloads are read without a call")
    routers: tuple[str, ...] = setting((), "addresses of routers to register with, separated by commas")
    events_redis: str = setting("", "redis:// URL that routers read memory events from; empty: they ask the worker")
    num_running_max: int = setting(2, "prompts at work at once")
    num_waiting_max: int = setting(64, "prompts waiting; more are refused with a retry hint")

    def __post_init__(self) -> None:
        # No zero-argument super(): a slotted dataclass is a new class, and `__class__` would still be the old one.
        EngineConfig.__post_init__(self)
        require(bool(self.store_address), "--store-address is needed: host:port of the kvstore service")
        check_url(self.events_redis)
        require(self.num_running_max > 0 and self.num_waiting_max > 0, "num_running_max and num_waiting_max start at 1")


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """One worker's calls."""

    def __init__(self, engine: Engine, config: PrefillConfig) -> None:
        self._engine = engine
        self._queue = PrefillQueue(config.num_running_max, config.num_waiting_max)

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: rpc.Context) -> prefill_pb2.PrefillResponse:
        engine = self._engine
        # 1. Check before queueing: a request that cannot work must not wait to be told so.
        tokens = tokens_from_wire(request.prompt)
        engine.check_prompt(len(tokens), int(tokens.max(initial=0)))
        # 2. Name the prompt's blocks.
        chain = engine.chain(request.tenant)
        chain.extend(tokens)
        prompt = Prompt(
            tokens=tokens,
            chain=chain,
            tenant=request.tenant,
            keep=tuple((kept.num_tokens, kept.ttl_s) for kept in request.keep),
        )
        # 3. Restore, compute, store.
        wait_s = engine.rates.prefill_s(len(tokens), context=0) * (self._queue.num_waiting + 1)
        async with self._queue.turn(wait_s):
            computed = await run_prompt(engine, prompt)
            try:
                # 4. Leave what decode needs to go on.
                handoff = await leave_handoff(engine, computed)
            finally:
                engine.blocks.release(computed.sequence.block_table)
        return prefill_pb2.PrefillResponse(handoff=handoff, restore=report_to_wire(computed.report))

    async def PrefillStatus(
        self, request: prefill_pb2.PrefillStatusRequest, context: rpc.Context
    ) -> prefill_pb2.PrefillStatusResponse:
        return prefill_pb2.PrefillStatusResponse(
            fingerprint=self._engine.fingerprint,
            num_running=self._queue.num_running,
            num_waiting=self._queue.num_waiting,
            num_blocks=self._engine.pool.num_blocks,
            num_resident_blocks=self._engine.blocks.num_resident,
            prefill_tokens_per_s=self._engine.rates.prefill_tokens_per_s,
        )


async def run(config: PrefillConfig, *, watch_stdin: bool = False) -> None:
    """Serve until told to stop.

    Raises:  ModelError, ConfigError: the model or a setting is not usable.
    """
    store = open_store(StoreAddress(address=config.store_address, directory=config.store_dir))
    engine = build_engine(config, store)
    await engine.register()
    servicer = PrefillServicer(engine, config)

    def add_services(server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server)
        add_window_service(engine, server)
        add_memory_service(engine.blocks.events, server)

    descriptors = [prefill_pb2.DESCRIPTOR, window_pb2.DESCRIPTOR, memory_pb2.DESCRIPTOR]
    server = await rpc.start_server(config.address, add_services, descriptors)
    lease = WorkerLease(
        config.routers,
        role="prefill",
        address=server.address,
        fingerprint=engine.fingerprint,
        keyring=engine.keyring,
    )
    async with lease, MemoryPublisher(config.events_redis, engine.blocks.events, server.address):
        await rpc.run_until_signal(server, role="prefill", stop=engine.close, watch_stdin=watch_stdin, leave=lease.end)
