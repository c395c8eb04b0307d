"""Typed clients of the services: value types in, value types out, our exceptions, a deadline on every call."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from antefix import rpc
from antefix.generation import GenerationRequest, Tokens
from antefix.sampling import Sampling
from antefix.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    usage_pb2,
    window_pb2,
    window_pb2_grpc,
)
from antefix.wire import (
    TokenLogprob,
    logprobs_from_wire,
    report_from_wire,
    sampling_to_wire,
    tokens_from_wire,
    tokens_to_wire,
)
from antefix.worker.report import RestoreReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """handoff: what decode asks the store for; empty when the store could not keep it."""

    handoff: bytes
    restore: RestoreReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One message of an output. finish_reason is set in the last one; stop_number: the stop sequence, from 1.

    logprobs: one a token, where they were asked for.
    """

    tokens: Tokens
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str = ""
    stop_number: int = 0
    restore: RestoreReport | None = None
    written_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request used; prompt_tokens = cache_hit_tokens + cache_miss_tokens."""

    request_id: str
    prompt_tokens: int
    cache_hit_tokens: int
    cache_miss_tokens: int
    output_tokens: int
    written_tokens: int
    ttft_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One message of the router's answer. sample: which of the outputs it belongs to.

    Each output's last message has its finish_reason; the last of all has usage and restore.
    """

    tokens: Tokens
    text: str
    finish_reason: str = ""
    usage: Usage | None = None
    restore: RestoreReport | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    sample: int = 0


@dataclass(slots=True)
class PrefillClient:
    """Calls to one prefill worker."""

    address: str
    _stub: prefill_pb2_grpc.PrefillServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self._stub = prefill_pb2_grpc.PrefillServiceStub(rpc.channel(self.address))

    async def prefill(self, request: GenerationRequest, *, timeout_s: float) -> Prefilled:
        """Window state is left at the request's breakpoints."""
        message = prefill_pb2.PrefillRequest(
            request_id=request.request_id, tenant=request.cache_tenant, prompt=tokens_to_wire(request.tokens)
        )
        for num_tokens, ttl_s in request.breakpoints:
            message.keep.add(num_tokens=num_tokens, ttl_s=ttl_s)
        with rpc.rpc_errors():
            response = await self._stub.Prefill(message, timeout=timeout_s)
        return Prefilled(handoff=response.handoff, restore=report_from_wire(response.restore))

    async def status(self, *, timeout_s: float = 5.0) -> prefill_pb2.PrefillStatusResponse:
        with rpc.rpc_errors():
            answer = await self._stub.PrefillStatus(prefill_pb2.PrefillStatusRequest(), timeout=timeout_s)
        return cast(prefill_pb2.PrefillStatusResponse, answer)


@dataclass(slots=True)
class DecodeClient:
    """Calls to one decode worker."""

    address: str
    _stub: decode_pb2_grpc.DecodeServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self._stub = decode_pb2_grpc.DecodeServiceStub(rpc.channel(self.address))

    async def decode(
        self,
        request: GenerationRequest,
        sampling: Sampling,
        *,
        handoff: bytes,
        emitted: Sequence[int],
        timeout_s: float,
    ) -> AsyncGenerator[Decoded, None]:
        """One output. sampling: this one's, with a seed of its own.  emitted: what was given out of it before."""
        message = decode_pb2.DecodeRequest(
            request_id=request.request_id,
            tenant=request.cache_tenant,
            prompt=tokens_to_wire(request.followed_by(emitted)),
            sampling=sampling_to_wire(sampling),
            handoff=handoff,
            num_emitted=len(emitted),
        )
        call = self._stub.Decode(message, timeout=timeout_s)
        try:
            with rpc.rpc_errors():
                async for answer in call:
                    yield Decoded(
                        tokens=tokens_from_wire(answer.tokens),
                        logprobs=logprobs_from_wire(answer.logprobs),
                        finish_reason=answer.finish_reason,
                        stop_number=answer.stop_number,
                        restore=report_from_wire(answer.restore) if answer.HasField("restore") else None,
                        written_tokens=answer.written_tokens,
                    )
        finally:
            call.cancel()  # a caller that stops early stops the work; after the end this does nothing

    async def status(self, *, timeout_s: float = 5.0) -> decode_pb2.DecodeStatusResponse:
        with rpc.rpc_errors():
            answer = await self._stub.DecodeStatus(decode_pb2.DecodeStatusRequest(), timeout=timeout_s)
        return cast(decode_pb2.DecodeStatusResponse, answer)


@dataclass(slots=True)
class WindowClient:
    """Calls about window state to one prefill or decode worker: for operators."""

    address: str
    _stub: window_pb2_grpc.WindowServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self._stub = window_pb2_grpc.WindowServiceStub(rpc.channel(self.address))

    async def status(self, *, num_plans_max: int = 0, timeout_s: float = 5.0) -> window_pb2.WindowStatusResponse:
        request = window_pb2.WindowStatusRequest(num_plans_max=num_plans_max)
        with rpc.rpc_errors():
            answer = await self._stub.WindowStatus(request, timeout=timeout_s)
        return cast(window_pb2.WindowStatusResponse, answer)

    async def set_strategy(self, strategy: str, *, timeout_s: float = 5.0) -> str:
        """Returns the strategy that was in force.  Raises:  InvalidRequest: not a strategy."""
        with rpc.rpc_errors():
            answer = await self._stub.SetStrategy(window_pb2.SetStrategyRequest(strategy=strategy), timeout=timeout_s)
        return str(answer.previous)


@dataclass(slots=True)
class RouterClient:
    """Calls to the router: what applications use."""

    address: str
    _stub: router_pb2_grpc.RouterServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self._stub = router_pb2_grpc.RouterServiceStub(rpc.channel(self.address))

    async def generate(
        self,
        prompt: str | Tokens,
        sampling: Sampling,
        *,
        tenant: str = "",
        request_id: str = "",
        session: str = "",
        num_samples: int = 1,
        timeout_s: float = 600.0,
    ) -> AsyncIterator[Generated]:
        """session: the caller's name of the conversation, a hint where to place it.  num_samples: outputs to make."""
        request = router_pb2.GenerateRequest(
            sampling=sampling_to_wire(sampling),
            tenant=tenant,
            request_id=request_id,
            session=session,
            num_samples=num_samples,
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokens.CopyFrom(tokens_to_wire(prompt))
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            with rpc.rpc_errors():
                async for message in call:
                    yield _generated(message)
        finally:
            call.cancel()

    async def status(self, *, timeout_s: float = 5.0) -> router_pb2.RouterStatusResponse:
        with rpc.rpc_errors():
            answer = await self._stub.RouterStatus(router_pb2.RouterStatusRequest(), timeout=timeout_s)
        return cast(router_pb2.RouterStatusResponse, answer)


def _generated(message: router_pb2.GenerateResponse) -> Generated:
    return Generated(
        tokens=tokens_from_wire(message.tokens),
        text=message.text,
        finish_reason=message.finish_reason,
        usage=usage_from_wire(message.usage) if message.HasField("usage") else None,
        restore=report_from_wire(message.restore) if message.HasField("restore") else None,
        logprobs=logprobs_from_wire(message.logprobs),
        sample=message.sample,
    )


def usage_from_wire(message: usage_pb2.Usage) -> Usage:
    return Usage(
        request_id=message.request_id,
        prompt_tokens=message.prompt_tokens,
        cache_hit_tokens=message.cache_hit_tokens,
        cache_miss_tokens=message.cache_miss_tokens,
        output_tokens=message.output_tokens,
        written_tokens=message.written_tokens,
        ttft_s=message.ttft_s,
        total_s=message.total_s,
    )


def usage_to_wire(usage: Usage) -> usage_pb2.Usage:
    return usage_pb2.Usage(
        request_id=usage.request_id,
        prompt_tokens=usage.prompt_tokens,
        cache_hit_tokens=usage.cache_hit_tokens,
        cache_miss_tokens=usage.cache_miss_tokens,
        output_tokens=usage.output_tokens,
        written_tokens=usage.written_tokens,
        ttft_s=usage.ttft_s,
        total_s=usage.total_s,
    )
