"""PrefillService: gRPC in front of `antefix_prefill.run_prompt`. Protobuf stops here."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from antefix import rpc
from antefix.cache_tenant import split_tenant
from antefix.config import require, setting
from antefix.generation_request import Breakpoint
from antefix.located import tell
from antefix.located_wire import hints_from_wire, speeds_to_wire
from antefix.security.identity import Role
from antefix.telemetry import span
from antefix.v1 import prefill_pb2, prefill_pb2_grpc
from antefix.wire import report_to_wire, tokens_from_wire
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.metrics import queue_metrics
from antefix_prefill.prefetch import Prefetcher
from antefix_prefill.prefill_queue import PrefillQueue
from antefix_prefill.restore import Prompt, has_short_rest
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker.compute_thread import compute_for
from antefix_prefill.worker.engine import Engine
from antefix_prefill.worker.read_speeds import near_stores, read_speeds
from antefix_prefill.worker.serving import WorkerConfig, secure_worker, serve_worker, start_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig(WorkerConfig):
    """Settings of a prefill worker."""

    num_running_max: int = setting(2, "most prompts that are computed at once")
    num_short_max: int = setting(
        4, "further prompts that may be computed at once, if each has at most one chunk left to compute"
    )
    num_waiting_max: int = setting(64, "most prompts that wait; further ones are refused with a retry hint")

    def __post_init__(self) -> None:
        # Not super().__post_init__(): a slotted dataclass is a new class, and `__class__` would be the old one.
        WorkerConfig.__post_init__(self)
        require(
            self.num_running_max > 0 and self.num_waiting_max > 0,
            "num_running_max and num_waiting_max must be at least 1",
        )
        require(self.num_short_max >= 0, "num_short_max must be at least 0")


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """The gRPC calls of one prefill worker."""

    def __init__(self, engine: Engine, config: PrefillConfig) -> None:
        self._engine = engine
        self.queue = PrefillQueue(config.num_running_max, config.num_waiting_max, config.num_short_max)
        self.prefetcher = Prefetcher(engine)

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: rpc.Context) -> prefill_pb2.PrefillResponse:
        engine = self._engine
        # 1. Check before queueing, so that a request that cannot work is refused without waiting.
        tokens = tokens_from_wire(request.prompt)
        engine.check_grant(request.tenant, tokens)
        engine.check_prompt(len(tokens), int(tokens.max(initial=0)))
        # 2. Name the prompt's blocks.
        chain = engine.chain(request.tenant)
        chain.extend(tokens)
        prompt = Prompt(
            tokens=tokens,
            chain=chain,
            tenant=request.tenant,
            breakpoints=tuple(Breakpoint(each.num_tokens, each.ttl_s) for each in request.breakpoints),
        )
        tell(hints_from_wire(request.hints, chain.hashes, engine.fingerprint))
        # 3. Restore, compute, store.
        wait_s = engine.rates.prefill_s(len(tokens), context=0) * (self.queue.num_waiting + 1)
        num_tokens = len(tokens) - engine.blocks.num_leading(chain.hashes) * engine.block_size
        tenant, _ = split_tenant(request.tenant)
        share = request.share or 1
        compute_for(tenant, share)
        async with contextlib.AsyncExitStack() as place:
            turn = self.queue.turn(
                wait_s,
                lambda: has_short_rest(engine, prompt),
                tenant=tenant,
                share=share,
                num_tokens=max(1, num_tokens),
            )
            async with self.prefetcher.while_waiting(prompt):
                await place.enter_async_context(turn)
            computed = await run_prompt(engine, prompt)
            try:
                # 4. Leave what decode needs to continue.
                with span("handoff", way="leave"):
                    handoff = await leave_handoff(engine, computed)
            finally:
                engine.blocks.release(computed.sequence.block_table)
        return prefill_pb2.PrefillResponse(
            handoff=handoff,
            restore=report_to_wire(computed.report),
            near_stores=near_stores(engine.store),
            tier_speeds=speeds_to_wire(read_speeds(engine, [hint.store for hint in request.hints])),
        )

    async def PrefillStatus(
        self, request: prefill_pb2.PrefillStatusRequest, context: rpc.Context
    ) -> prefill_pb2.PrefillStatusResponse:
        return prefill_pb2.PrefillStatusResponse(
            fingerprint=self._engine.fingerprint,
            num_running=self.queue.num_running,
            num_waiting=self.queue.num_waiting,
            num_blocks=self._engine.pool.num_blocks,
            num_resident_blocks=self._engine.blocks.num_resident,
            prefill_tokens_per_s=self._engine.rates.prefill_tokens_per_s,
            arithmetic=self._engine.arithmetic.name,
            setup=self._engine.arithmetic.setup,
        )


async def run(config: PrefillConfig, *, watch_stdin: bool = False) -> None:
    """Serve until told to stop.

    Raises:  ModelError, ConfigError: the model or a setting is not usable.
    """
    security = secure_worker(config, Role.PREFILL)
    engine = await start_engine(config, may_call=security.check_calling_one)
    servicer = PrefillServicer(engine, config)
    await serve_worker(
        config,
        engine,
        security=security,
        metrics=lambda: queue_metrics(servicer.queue, engine.rates, servicer.prefetcher.counters),
        add_service=lambda server: prefill_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server),
        descriptors=[prefill_pb2.DESCRIPTOR],
        stop=engine.close,
        watch_stdin=watch_stdin,
    )
