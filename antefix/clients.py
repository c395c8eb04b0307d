"""Typed clients of the services: value types in, value types out, our exceptions, a deadline on every call."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from antefix import rpc
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
    Sampling,
    TokenLogprob,
    logprobs_from_wire,
    report_from_wire,
    sampling_to_wire,
    tokens_from_wire,
    tokens_to_wire,
)
from antefix.worker.report import RestoreReport

Tokens = npt.NDArray[np.uint32]


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
    write_error: str = ""


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
    """One message of the router's answer; the last one has finish_reason, usage and restore."""

    tokens: Tokens
    text: str
    finish_reason: str = ""
    usage: Usage | None = None
    restore: RestoreReport | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class PrefillClient:
    """Calls to one prefill worker."""

    address: str
    _stub: prefill_pb2_grpc.PrefillServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self._stub = prefill_pb2_grpc.PrefillServiceStub(rpc.channel(self.address))

    async def prefill(
        self,
        tokens: Tokens,
        *,
        request_id: str,
        tenant: str,
        timeout_s: float,
        keep: Sequence[tuple[int, float]] = (),
    ) -> Prefilled:
        """keep: (tokens, seconds) of prefixes that window state is to be left at."""
        request = prefill_pb2.PrefillRequest(request_id=request_id, tenant=tenant, prompt=tokens_to_wire(tokens))
        for num_tokens, ttl_s in keep:
            request.keep.add(num_tokens=num_tokens, ttl_s=ttl_s)
        with rpc.rpc_errors():
            response = await self._stub.Prefill(request, timeout=timeout_s)
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
        tokens: Tokens,
        sampling: Sampling,
        *,
        request_id: str,
        tenant: str,
        handoff: bytes,
        num_emitted: int = 0,
        timeout_s: float,
    ) -> AsyncGenerator[Decoded, None]:
        request = decode_pb2.DecodeRequest(
            request_id=request_id,
            tenant=tenant,
            prompt=tokens_to_wire(tokens),
            sampling=sampling_to_wire(sampling),
            handoff=handoff,
            num_emitted=num_emitted,
        )
        call = self._stub.Decode(request, timeout=timeout_s)
        try:
            with rpc.rpc_errors():
                async for message in call:
                    yield Decoded(
                        tokens=tokens_from_wire(message.tokens),
                        logprobs=logprobs_from_wire(message.logprobs),
                        finish_reason=message.finish_reason,
                        stop_number=message.stop_number,
                        restore=report_from_wire(message.restore) if message.HasField("restore") else None,
                        written_tokens=message.written_tokens,
                        write_error=message.write_error,
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
        timeout_s: float = 600.0,
    ) -> AsyncIterator[Generated]:
        """session: the caller's name of the conversation, a hint where to place it."""
        request = router_pb2.GenerateRequest(
            sampling=sampling_to_wire(sampling), tenant=tenant, request_id=request_id, session=session
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
