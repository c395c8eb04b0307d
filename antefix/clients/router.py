"""Calls to the router: what applications use."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc

from antefix import rpc
from antefix.block import TokenArray as Tokens
from antefix.clients.service_client import ServiceClient
from antefix.clients.statuses import RouterStatus, router_status_from_wire
from antefix.generation_request import Caller, check_text
from antefix.request_limits import answered
from antefix.restore_report import RestoreReport
from antefix.sampling import Sampling
from antefix.security.identity import Role
from antefix.telemetry.context import outgoing
from antefix.usage import Usage
from antefix.v1 import router_pb2, router_pb2_grpc
from antefix.wire import (
    TokenLogprob,
    logprobs_from_wire,
    report_from_wire,
    sampling_to_wire,
    tokens_from_wire,
    tokens_to_wire,
    usage_from_wire,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One message of the router's answer. sample: the number of the output that the message belongs to.

    Each output's last message has its finish_reason; the last of all has usage and restore, the request's id, and how
    long it took.
    """

    tokens: Tokens
    text: str
    finish_reason: str = ""
    usage: Usage | None = None
    restore: RestoreReport | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    sample: int = 0
    request_id: str = ""
    total_s: float = 0.0


class RouterClient(ServiceClient[router_pb2_grpc.RouterServiceStub]):
    """Calls to the router: what applications use."""

    _of = Role.ROUTER

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
        num_samples: int = 1,
        timeout_s: float = 600.0,
    ) -> AsyncGenerator[Generated, None]:
        """Stream the router's answer; if the caller leaves the stream, the request's work stops.

        session: the caller's name of the conversation, a hint where to place it.
        num_samples: outputs to make.
        request_id: sent again, it is a retry of the same request.
        Raises:  InvalidRequest: a name or the prompt is no text, or what the router refuses.
        """
        Caller(tenant=tenant, request_id=request_id, session=session)  # refuses what cannot be sent
        if isinstance(prompt, str):
            check_text("prompt", prompt)
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
        call = self._stream(self._stub.Generate(request, timeout=timeout_s, metadata=outgoing()))
        try:
            with rpc.rpc_errors():
                async for message in call:
                    answered(message)
                    yield _generated(message)
        finally:
            call.cancel()

    async def status(self, *, timeout_s: float = 5.0) -> RouterStatus:
        """The workers that the router knows, and the router's own counters."""
        with rpc.rpc_errors():
            answer = answered(await self._stub.RouterStatus(router_pb2.RouterStatusRequest(), timeout=timeout_s))
        return router_status_from_wire(answer)


def _generated(message: router_pb2.GenerateResponse) -> Generated:
    return Generated(
        tokens=tokens_from_wire(message.tokens),
        text=message.text,
        finish_reason=message.finish_reason,
        usage=usage_from_wire(message.usage) if message.HasField("usage") else None,
        restore=report_from_wire(message.restore) if message.HasField("restore") else None,
        logprobs=logprobs_from_wire(message.logprobs),
        sample=message.sample,
        request_id=message.usage.request_id,
        total_s=message.usage.total_s,
    )
