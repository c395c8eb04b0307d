"""Calls to the router: what applications use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import cast

from antefix import rpc
from antefix.block import TokenArray as Tokens
from antefix.clients.usage import Usage, usage_from_wire
from antefix.restore_report import RestoreReport
from antefix.telemetry.context import outgoing
from antefix.v1 import router_pb2, router_pb2_grpc
from antefix.wire import (
    Sampling,
    TokenLogprob,
    logprobs_from_wire,
    report_from_wire,
    sampling_to_wire,
    tokens_from_wire,
    tokens_to_wire,
)


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
        call = self._stub.Generate(request, timeout=timeout_s, metadata=outgoing())
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
