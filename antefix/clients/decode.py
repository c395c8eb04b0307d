"""Calls to a decode worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from antefix import rpc
from antefix.block import TokenArray as Tokens
from antefix.clients.service_client import ServiceClient
from antefix.clients.statuses import DecodeStatus, decode_status_from_wire
from antefix.errors import Unavailable
from antefix.generation_request import GenerationRequest
from antefix.located import Located, ReadSpeed
from antefix.located_wire import hints_to_wire, speeds_from_wire
from antefix.request_limits import answered
from antefix.restore_report import RestoreReport
from antefix.sampling import Sampling
from antefix.security.identity import Role
from antefix.telemetry.context import outgoing
from antefix.v1 import decode_pb2, decode_pb2_grpc
from antefix.wire import (
    TokenLogprob,
    logprobs_from_wire,
    report_from_wire,
    sampling_to_wire,
    tokens_from_wire,
    tokens_to_wire,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One message of an output. finish_reason is set in the last one; stop_number: the stop sequence, from 1.

    logprobs: one log probability per token, if requested. speeds: only in the last message, as in `Prefilled`.
    """

    tokens: Tokens
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str = ""
    stop_number: int = 0
    restore: RestoreReport | None = None
    written_tokens: int = 0
    write_error: str = ""
    speeds: Mapping[str, ReadSpeed] = field(default_factory=dict)


class DecodeClient(ServiceClient[decode_pb2_grpc.DecodeServiceStub]):
    """Calls to one decode worker."""

    _of = Role.DECODE

    def _make_stub(self, channel: grpc.aio.Channel) -> decode_pb2_grpc.DecodeServiceStub:
        return decode_pb2_grpc.DecodeServiceStub(channel)

    async def decode(
        self,
        request: GenerationRequest,
        sampling: Sampling,
        *,
        handoff: bytes,
        emitted: Sequence[int],
        timeout_s: float,
        located: Located | None = None,
    ) -> AsyncGenerator[Decoded, None]:
        """Stream one output of a decode worker; if the caller leaves the stream, the worker stops.

        sampling: the settings of this output, with a seed of its own. emitted: tokens of this output that were sent
        already. located: which of several stores probably has which blocks of the prompt.
        """
        message = decode_pb2.DecodeRequest(
            request_id=request.request_id,
            tenant=request.cache_tenant,
            prompt=tokens_to_wire(request.followed_by(emitted)),
            sampling=sampling_to_wire(sampling),
            handoff=handoff,
            num_emitted=len(emitted),
            hints=hints_to_wire(located),
            share=request.share,
        )
        num_tokens, num_left = len(request.tokens) + len(emitted), sampling.max_tokens - len(emitted)
        call = self._stream(self._stub.Decode(message, timeout=timeout_s, metadata=outgoing()))
        try:
            with rpc.rpc_errors():
                async for answer in call:
                    tokens = tokens_from_wire(answered(answer).tokens)
                    num_left -= len(tokens)
                    if num_left < 0:
                        raise Unavailable("the worker's answer cannot be right: it has more tokens than were asked for")
                    yield Decoded(
                        tokens=tokens,
                        logprobs=logprobs_from_wire(answer.logprobs),
                        finish_reason=answer.finish_reason,
                        stop_number=answer.stop_number,
                        restore=report_from_wire(answer.restore, num_tokens) if answer.HasField("restore") else None,
                        written_tokens=answer.written_tokens,
                        write_error=answer.write_error,
                        speeds=speeds_from_wire(answer.tier_speeds),
                    )
        finally:
            call.cancel()  # a caller that stops early stops the work; after the end this does nothing

    async def status(self, *, timeout_s: float = 5.0) -> DecodeStatus:
        """What the worker does now."""
        with rpc.rpc_errors():
            answer = answered(await self._stub.DecodeStatus(decode_pb2.DecodeStatusRequest(), timeout=timeout_s))
        return decode_status_from_wire(answer)
