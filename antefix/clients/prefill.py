"""Calls to a prefill worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from antefix import rpc
from antefix.block import TokenArray as Tokens
from antefix.clients.service_client import ServiceClient
from antefix.clients.statuses import PrefillStatus, prefill_status_from_wire
from antefix.restore_report import RestoreReport
from antefix.telemetry.context import outgoing
from antefix.v1 import prefill_pb2, prefill_pb2_grpc
from antefix.wire import report_from_wire, tokens_to_wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """handoff: what decode asks the store for; empty when the store could not keep it."""

    handoff: bytes
    restore: RestoreReport


class PrefillClient(ServiceClient[prefill_pb2_grpc.PrefillServiceStub]):
    """Calls to one prefill worker."""

    def _make_stub(self, channel: grpc.aio.Channel) -> prefill_pb2_grpc.PrefillServiceStub:
        return prefill_pb2_grpc.PrefillServiceStub(channel)

    async def prefill(
        self,
        tokens: Tokens,
        *,
        request_id: str,
        tenant: str,
        timeout_s: float,
        keep: Sequence[tuple[int, float]] = (),
    ) -> Prefilled:
        """Compute and store a prompt's KV, restoring what is stored of it.

        keep: (tokens, seconds) of prefixes that window state is to be left at.
        """
        request = prefill_pb2.PrefillRequest(request_id=request_id, tenant=tenant, prompt=tokens_to_wire(tokens))
        for num_tokens, ttl_s in keep:
            request.keep.add(num_tokens=num_tokens, ttl_s=ttl_s)
        with rpc.rpc_errors():
            response = await self._stub.Prefill(request, timeout=timeout_s, metadata=outgoing())
        return Prefilled(handoff=response.handoff, restore=report_from_wire(response.restore))

    async def status(self, *, timeout_s: float = 5.0) -> PrefillStatus:
        """What the worker does now."""
        with rpc.rpc_errors():
            answer = await self._stub.PrefillStatus(prefill_pb2.PrefillStatusRequest(), timeout=timeout_s)
        return prefill_status_from_wire(answer)
