"""Asks any service of a deployment what it is."""

from __future__ import annotations

import time
from dataclasses import dataclass

from antefix import rpc
from antefix.request_limits import answered
from antefix.security.identity import Role
from antefix.v1 import about_pb2, about_pb2_grpc

_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a process says of itself. ahead_s: of its clock, before ours; known to half of round_trip_s.

    certificate_ends_s: Unix time, 0 without TLS.  secret_marks: one per secret that it knows, the current one first.
    calls: services that it calls and that do not register with anybody.
    """

    role: str
    version: str
    ahead_s: float
    round_trip_s: float
    certificate_ends_s: float
    secret_marks: tuple[bytes, ...]
    calls: tuple[str, ...]


async def ask_about(address: str, *, role: Role | None = None) -> About:
    """role: whom we mean to call, which its certificate must say.

    Raises:  Unavailable: nobody answers there.  PermissionDenied, Unauthenticated: it is not for us.
    """
    channel = rpc.channel(address, of=role)
    stub = about_pb2_grpc.AboutServiceStub(channel)
    try:
        with rpc.rpc_errors():
            # The first call makes the connection; the second one's time is that of a call.
            await stub.About(about_pb2.AboutRequest(), timeout=_DEADLINE_S)
            sent, started = time.time(), time.perf_counter()
            answer = answered(await stub.About(about_pb2.AboutRequest(), timeout=_DEADLINE_S))
            round_trip_s = time.perf_counter() - started
    finally:
        await channel.close()
    return About(
        role=answer.role,
        version=answer.version,
        ahead_s=answer.now_unix_ms / 1000 - (sent + round_trip_s / 2),
        round_trip_s=round_trip_s,
        certificate_ends_s=answer.certificate_ends_unix_ms / 1000,
        secret_marks=tuple(answer.secret_marks),
        calls=tuple(answer.calls),
    )
