"""Calls to a prefill worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc

from antefix import rpc
from antefix.clients.service_client import ServiceClient
from antefix.clients.statuses import PrefillStatus, prefill_status_from_wire
from antefix.generation_request import GenerationRequest
from antefix.located import Located, ReadSpeed
from antefix.located_wire import hints_to_wire, speeds_from_wire
from antefix.request_limits import answered
from antefix.restore_report import RestoreReport
from antefix.security.identity import Role
from antefix.telemetry.context import outgoing
from antefix.v1 import prefill_pb2, prefill_pb2_grpc
from antefix.wire import report_from_wire, tokens_to_wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """handoff: the name by which decode fetches the prompt's live state from the store; empty if the store could not
    keep the state.

    near_stores: the stores, out of several, that the worker writes to. speeds: its read speeds of stores and tiers, by
    name.
    """

    handoff: bytes
    restore: RestoreReport
    near_stores: tuple[str, ...] = ()
    speeds: Mapping[str, ReadSpeed] = field(default_factory=dict)


class PrefillClient(ServiceClient[prefill_pb2_grpc.PrefillServiceStub]):
    """Calls to one prefill worker."""

    _of = Role.PREFILL

    def _make_stub(self, channel: grpc.aio.Channel) -> prefill_pb2_grpc.PrefillServiceStub:
        return prefill_pb2_grpc.PrefillServiceStub(channel)

    async def prefill(
        self, request: GenerationRequest, *, timeout_s: float, located: Located | None = None
    ) -> Prefilled:
        """Compute the KV of a prompt and store it; the part that is stored already is restored instead.

        Checkpoints of window state are stored at the request's breakpoints. located: which of several stores probably
        has which blocks.
        """
        message = prefill_pb2.PrefillRequest(
            request_id=request.request_id,
            tenant=request.cache_tenant,
            prompt=tokens_to_wire(request.tokens),
            hints=hints_to_wire(located),
            share=request.share,
        )
        for num_tokens, ttl_s in request.breakpoints:
            message.breakpoints.add(num_tokens=num_tokens, ttl_s=ttl_s)
        with rpc.rpc_errors():
            response = answered(await self._stub.Prefill(message, timeout=timeout_s, metadata=outgoing()))
        return Prefilled(
            handoff=response.handoff,
            restore=report_from_wire(response.restore, len(request.tokens)),
            near_stores=tuple(response.near_stores),
            speeds=speeds_from_wire(response.tier_speeds),
        )

    async def status(self, *, timeout_s: float = 5.0) -> PrefillStatus:
        """What the worker does now."""
        with rpc.rpc_errors():
            answer = answered(await self._stub.PrefillStatus(prefill_pb2.PrefillStatusRequest(), timeout=timeout_s))
        return prefill_status_from_wire(answer)
