"""Calls of operators to a router that serves workers of other inference engines."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from antefix import rpc
from antefix.clients.service_client import ServiceClient
from antefix.miss_reason import MissReason
from antefix.request_limits import answered
from antefix.v1 import fleet_pb2, fleet_pb2_grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One cache of the fleet: a worker's data-parallel rank.

    knowledge: Whether the router knows a cache's contents: "events" (the router has the worker's latest report),
    "behind" (some reports are missing), "guess" (the worker reports nothing). blocks: how many blocks the worker
    reported. *_hit_tokens: totals over the worker's answers so far.
    """

    worker: str
    up: bool
    models: tuple[str, ...]
    knowledge: str
    block_size: int
    blocks: int
    requests: int
    pending_tokens: int
    expected_hit_tokens: int
    reported_hit_tokens: int
    lost_hit_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateEngine:
    """What the router knows about a worker for one prompt. hit_tokens: how many tokens may hit there. leading_tokens:
    how many of the prompt's first tokens the worker has; larger than hit_tokens if the worker cannot resume at that
    point. media: the same numbers for each kind of memory.
    """

    engine: EngineStatus
    hit_tokens: int
    leading_tokens: int
    media: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedRequest:
    """The router's prediction for a request that would arrive now. prompt_tokens: 0 if no worker could count them.
    chosen: the worker that would get the request.
    """

    model: str
    prompt_tokens: int
    candidates: tuple[CandidateEngine, ...]
    chosen: str
    miss_reason: MissReason
    first_missed_token: int


class FleetClient(ServiceClient[fleet_pb2_grpc.FleetServiceStub]):
    """Calls of operators to a router that serves workers of other inference engines."""

    def _make_stub(self, channel: grpc.aio.Channel) -> fleet_pb2_grpc.FleetServiceStub:
        return fleet_pb2_grpc.FleetServiceStub(channel)

    async def status(self, *, timeout_s: float = 5.0) -> tuple[EngineStatus, ...]:
        """What a router knows of the workers that it serves."""
        with rpc.rpc_errors():
            answer = answered(await self._stub.FleetStatus(fleet_pb2.FleetStatusRequest(), timeout=timeout_s))
        return tuple(_engine(engine) for engine in answer.engines)

    async def explain(
        self, body: str, *, tenant: str = "", session: str = "", timeout_s: float = 30.0
    ) -> ExplainedRequest:
        """What the router would do with a request that has this JSON body. Raises: InvalidRequest: the HTTP API would
        refuse this request.
        """
        request = fleet_pb2.ExplainRequestRequest(body=body, tenant=tenant, session=session)
        with rpc.rpc_errors():
            answer = answered(await self._stub.ExplainRequest(request, timeout=timeout_s))
        return ExplainedRequest(
            model=answer.model,
            prompt_tokens=answer.prompt_tokens,
            candidates=tuple(
                CandidateEngine(
                    engine=_engine(each.engine),
                    hit_tokens=each.hit_tokens,
                    leading_tokens=each.leading_tokens,
                    media=tuple((medium.medium, medium.tokens) for medium in each.media),
                )
                for each in answer.candidates
            ),
            chosen=answer.chosen,
            miss_reason=MissReason(answer.miss_reason),
            first_missed_token=answer.first_missed_token,
        )


def _engine(message: fleet_pb2.EngineStatus) -> EngineStatus:
    names = set(EngineStatus.__slots__) - {"models"}
    return EngineStatus(models=tuple(message.models), **{name: getattr(message, name) for name in names})
