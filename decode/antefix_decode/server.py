"""DecodeService: gRPC in front of the scheduler. Protobuf stops here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import numpy as np

from antefix import rpc
from antefix.cache_tenant import split_tenant
from antefix.config import require, setting
from antefix.errors import InvalidRequest
from antefix.grammar import Vocabulary
from antefix.located import tell
from antefix.located_wire import hints_from_wire, speeds_to_wire
from antefix.sampling import Sampling
from antefix.security.identity import Role
from antefix.telemetry import begin, span
from antefix.tokenizer import Tokenizer, load_tokenizer
from antefix.v1 import decode_pb2, decode_pb2_grpc
from antefix.wire import (
    logprobs_to_wire,
    report_to_wire,
    sampling_from_wire,
    tokens_from_wire,
    tokens_to_wire,
)
from antefix_decode.adopt import Adopted, adopt, prefill_here, take_handoff
from antefix_decode.grammar_state import Grammars
from antefix_decode.logprobs import Logprobs
from antefix_decode.metrics import scheduler_metrics
from antefix_decode.penalties import Penalties
from antefix_decode.scheduler import Running, Scheduler, VisibleTokens
from antefix_decode.step_shares import Place
from antefix_decode.stopping import Stopper
from antefix_decode.token_choice import Sampler
from antefix_prefill.prefetch import Prefetcher
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.restore import Prompt
from antefix_prefill.worker.compute_thread import compute_for
from antefix_prefill.worker.engine import Engine
from antefix_prefill.worker.read_speeds import read_speeds
from antefix_prefill.worker.serving import WorkerConfig, secure_worker, serve_worker, start_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig(WorkerConfig):
    """Settings of a decode worker."""

    num_running_max: int = setting(32, "most sequences that run at once; further ones wait, and tenants take turns")
    num_waiting_max: int = setting(
        64, "most requests that wait for a place; further ones are refused with a retry hint"
    )

    def __post_init__(self) -> None:
        # Not super().__post_init__(): a slotted dataclass is a new class, and `__class__` would be the old one.
        WorkerConfig.__post_init__(self)
        require(self.num_running_max > 0, f"num_running_max must be positive, is {self.num_running_max}")
        require(self.num_waiting_max >= 0, f"num_waiting_max must not be negative, is {self.num_waiting_max}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request. emitted: the tokens at the prompt's end that the client already has as output of another worker."""

    prompt: Prompt
    sampling: Sampling
    emitted: list[int]
    place: Place


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """The gRPC calls of one decode worker."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: DecodeConfig) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        self.scheduler = Scheduler(engine, config.num_running_max, config.num_waiting_max)
        self.prefetcher = Prefetcher(engine)

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: rpc.Context
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        # 1. Check.
        sampling = sampling_from_wire(request.sampling)
        prompt, emitted = self._prompt(request, sampling)
        tenant, _ = split_tenant(request.tenant)
        share = request.share or 1
        compute_for(tenant, share)
        tell(hints_from_wire(request.hints, prompt.chain.hashes, self._engine.fingerprint))
        async with contextlib.AsyncExitStack() as turn:
            # With a handoff, the first token needs nothing from the store.
            waiting = contextlib.nullcontext() if request.handoff else self.prefetcher.while_waiting(prompt)
            async with waiting:
                place = await turn.enter_async_context(
                    self.scheduler.place(tenant, sampling.max_tokens - len(emitted), share)
                )
            asked = _Asked(prompt=prompt, sampling=sampling, emitted=emitted, place=place)
            async with contextlib.aclosing(self._decode(asked, request.handoff)) as responses:
                async for response in responses:
                    if response.finish_reason:
                        speeds = read_speeds(self._engine, [hint.store for hint in request.hints])
                        response.tier_speeds.extend(speeds_to_wire(speeds))
                    yield response

    async def _decode(self, asked: _Asked, name: bytes) -> AsyncGenerator[decode_pb2.DecodeResponse, None]:
        prompt, sampling, emitted = asked.prompt, asked.sampling, asked.emitted
        sampler = await self._sampler(sampling, prompt, emitted)
        stopper = Stopper(sampling, self._tokenizer.eos_ids, emitted)
        logprobs = Logprobs(sampling.num_top_logprobs)
        # 2. The first token comes from the handoff's logits, before any block is loaded.
        with span("handoff", way="take"):
            handoff = await take_handoff(self._engine, prompt, name)
        adopted = await prefill_here(self._engine, prompt) if handoff is None else None
        try:
            logits = adopted.logits if handoff is None and adopted else handoff.logits  # type: ignore[union-attr]
            first = sampler.choose(logits, prompt.num_tokens)
            logprobs.push(logits, first)
            shown = stopper.push(first, is_last=sampler.is_over)
            yield _response(VisibleTokens(tokens=shown, logprobs=logprobs.take(len(shown))), adopted)
            if stopper.finish_reason:
                yield decode_pb2.DecodeResponse(finish_reason=stopper.finish_reason, stop_number=stopper.stop_number)
                return
            # 3. Load what the handoff does not contain. If a block is gone by now, prefill after all.
            if handoff is not None:
                with span("handoff", way="adopt"):
                    adopted = await adopt(self._engine, prompt, handoff)
                adopted = adopted or await prefill_here(self._engine, prompt)
                yield _response(VisibleTokens(tokens=[]), adopted)
            assert adopted is not None
            sequence, adopted = adopted.sequence, None
        finally:
            if adopted is not None:
                self._engine.blocks.release(adopted.sequence.block_table)
        # 4. Generate, in a batch with the other sequences.
        running = Running(
            prompt=prompt,
            sequence=sequence,
            sampler=sampler,
            stopper=stopper,
            writer=RecordWriter(
                self._engine.store,
                self._engine.counters,
                self._engine.window_pool,
                writes=not self._engine.borrows,
                patience=self._engine.patience,
            ),
            next_token=first,
            prompt_tokens=prompt.num_tokens,
            logprobs=logprobs,
            place=asked.place,
        )
        async with contextlib.aclosing(self._generate(running)) as responses:
            async for response in responses:
                yield response

    async def _generate(self, running: Running) -> AsyncGenerator[decode_pb2.DecodeResponse, None]:
        self.scheduler.join(running)
        try:
            steps = begin("decode steps", num_running=self.scheduler.num_running)
            try:
                async for shown in self.scheduler.tokens(running):
                    yield _response(shown, None)
            finally:
                steps.set(num_steps=running.sequence.position - running.prompt_tokens)
                steps.end()
            # 5. Make the output's KV durable before the client learns of the end: its next turn may follow at once.
            with span("store", part="output"):
                await self.scheduler.store_end(running)
            yield decode_pb2.DecodeResponse(
                finish_reason=running.stopper.finish_reason,
                stop_number=running.stopper.stop_number,
                written_tokens=running.writer.num_blocks_written * self._engine.block_size,
                written_checkpoints=running.writer.num_checkpoints_written,
                write_error=running.writer.error,
            )
        finally:
            await self.scheduler.leave(running)

    async def _sampler(self, sampling: Sampling, prompt: Prompt, emitted: list[int]) -> Sampler:
        """Raises:  InvalidRequest: the request's grammar cannot be used."""
        asked = prompt.tokens[: prompt.num_tokens - len(emitted)]
        penalties = Penalties(sampling, stop_ids=self._tokenizer.eos_ids, prompt=asked, emitted=emitted)
        if not sampling.grammar:
            return Sampler(sampling, penalties)
        if self._grammars is None:
            # Preparing a large vocabulary takes a second; a worker that gets no grammars never needs it.
            size = self._engine.identity.vocab_size
            self._grammars = Grammars(await asyncio.to_thread(Vocabulary, self._tokenizer, size))
        return Sampler(sampling, penalties, await self._grammars.matcher(sampling.grammar, emitted))

    def _prompt(self, request: decode_pb2.DecodeRequest, sampling: Sampling) -> tuple[Prompt, list[int]]:
        tokens = tokens_from_wire(request.prompt)
        if request.num_emitted > len(tokens) or request.num_emitted >= sampling.max_tokens:
            raise InvalidRequest(f"num_emitted is {request.num_emitted}, so no token is left to generate")
        self._engine.check_grant(request.tenant, tokens[: len(tokens) - request.num_emitted])
        remaining = sampling.max_tokens - request.num_emitted
        sampling.check_vocabulary(self._engine.identity.vocab_size)
        self._engine.check_prompt(len(tokens), int(tokens.max(initial=0)), remaining)
        chain = self._engine.chain(request.tenant)
        chain.extend(tokens)
        emitted = [int(token) for token in tokens[len(tokens) - request.num_emitted :]]
        return Prompt(tokens=tokens, chain=chain, tenant=request.tenant), emitted

    async def DecodeStatus(
        self, request: decode_pb2.DecodeStatusRequest, context: rpc.Context
    ) -> decode_pb2.DecodeStatusResponse:
        return decode_pb2.DecodeStatusResponse(
            fingerprint=self._engine.fingerprint,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_blocks=self._engine.pool.num_blocks,
            num_resident_blocks=self._engine.blocks.num_resident,
            decode_tokens_per_s=self.scheduler.tokens_per_s,
            arithmetic=self._engine.arithmetic.name,
            setup=self._engine.arithmetic.setup,
        )


def _response(shown: VisibleTokens, adopted: Adopted | None) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(
        tokens=tokens_to_wire(np.array(shown.tokens, np.uint32)) if shown.tokens else None,
        logprobs=logprobs_to_wire(shown.logprobs),
        restore=report_to_wire(adopted.report) if adopted else None,
    )


async def run(config: DecodeConfig, *, watch_stdin: bool = False) -> None:
    """Serve until told to stop.

    Raises:  ModelError, ConfigError: the model or a setting is not usable.
    """
    security = secure_worker(config, Role.DECODE)
    engine = await start_engine(config, may_call=security.check_calling_one)
    servicer = DecodeServicer(engine, load_tokenizer(config.model), config)
    if (runner := engine.ops.step_runner) is not None:
        # Kernels that are compiled and graphs that are recorded now delay no request later.
        await engine.compute.run(runner.prepare, engine.model, engine.pool, config.num_running_max)

    async def stop() -> None:
        await servicer.scheduler.close()
        await engine.close()

    await serve_worker(
        config,
        engine,
        security=security,
        metrics=lambda: scheduler_metrics(servicer.scheduler, servicer.prefetcher.counters),
        add_service=lambda server: decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server),
        descriptors=[decode_pb2.DESCRIPTOR],
        stop=stop,
        watch_stdin=watch_stdin,
    )
