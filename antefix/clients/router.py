"""Calls to the router: what applications use."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc

from antefix import rpc
from antefix.block import TokenArray as Tokens
from antefix.clients.service_client import ServiceClient
from antefix.clients.statuses import RouterStatus, router_status_from_wire
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


class RouterClient(ServiceClient[router_pb2_grpc.RouterServiceStub]):
    """Calls to the router: what applications use."""

    def _make_stub(self, channel: grpc.aio.Channel) -> router_pb2_grpc.RouterServiceStub:
        return router_pb2_grpc.RouterServiceStub(channel)

    async def generate(
        self,
        prompt: str | Tokens,
        sampling: Sampling,
        *,
        tenant: str = "",
        request_id: str = "",
        session: str = "",
        timeout_s: float = 600.0,
    ) -> AsyncGenerator[Generated, None]:
        """Stream an answer; leaving the stream stops the work.

        session: the caller's name of the conversation, a hint where to place it.
        request_id: sent again, it is a retry of the same request.
        """
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

    async def status(self, *, timeout_s: float = 5.0) -> RouterStatus:
        """The workers that the router knows, and what it counted."""
        with rpc.rpc_errors():
            answer = await self._stub.RouterStatus(router_pb2.RouterStatusRequest(), timeout=timeout_s)
        return router_status_from_wire(answer)


def _generated(message: router_pb2.GenerateResponse) -> Generated:
    return Generated(
        tokens=tokens_from_wire(message.tokens),
        text=message.text,
        finish_reason=message.finish_reason,
        usage=usage_from_wire(message.usage) if message.HasField("usage") else None,
        restore=report_from_wire(message.restore) if message.HasField("restore") else None,
        logprobs=logprobs_from_wire(message.logprobs),
    )
