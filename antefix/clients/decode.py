"""Calls to a decode worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc

from antefix import rpc
from antefix.block import TokenArray as Tokens
from antefix.clients.service_client import ServiceClient
from antefix.clients.statuses import DecodeStatus, decode_status_from_wire
from antefix.restore_report import RestoreReport
from antefix.telemetry.context import outgoing
from antefix.v1 import decode_pb2, decode_pb2_grpc
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


class DecodeClient(ServiceClient[decode_pb2_grpc.DecodeServiceStub]):
    """Calls to one decode worker."""

    def _make_stub(self, channel: grpc.aio.Channel) -> decode_pb2_grpc.DecodeServiceStub:
        return decode_pb2_grpc.DecodeServiceStub(channel)

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
        """Stream an output; leaving the stream stops the work.

        num_emitted: tokens at the end of `tokens` that are of this output, and that the client has already.
        """
        request = decode_pb2.DecodeRequest(
            request_id=request_id,
            tenant=tenant,
            prompt=tokens_to_wire(tokens),
            sampling=sampling_to_wire(sampling),
            handoff=handoff,
            num_emitted=num_emitted,
        )
        call = self._stub.Decode(request, timeout=timeout_s, metadata=outgoing())
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

    async def status(self, *, timeout_s: float = 5.0) -> DecodeStatus:
        """What the worker does now."""
        with rpc.rpc_errors():
            answer = await self._stub.DecodeStatus(decode_pb2.DecodeStatusRequest(), timeout=timeout_s)
        return decode_status_from_wire(answer)
