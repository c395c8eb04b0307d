"""Calls to a prefill worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from antefix import rpc
from antefix.generation_request import GenerationRequest
from antefix.restore_report import RestoreReport
from antefix.v1 import prefill_pb2, prefill_pb2_grpc
from antefix.wire import report_from_wire, tokens_to_wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """handoff: what decode asks the store for; empty when the store could not keep it."""

    handoff: bytes
    restore: RestoreReport


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
