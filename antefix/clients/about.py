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
    """A process's description of itself.

    ahead_s: how far the service's clock is ahead of this process's clock, accurate to half of round_trip_s.
    certificate_ends_s: when its certificate expires, in Unix time; 0 without TLS. secret_marks: one short mark per
    secret that it has, the current secret's mark first. calls: addresses of services that it calls and that register
    with no router.
    """

    role: str
    version: str
    ahead_s: float
    round_trip_s: float
    certificate_ends_s: float
    secret_marks: tuple[bytes, ...]
    calls: tuple[str, ...]


async def ask_about(address: str, *, role: Role | None = None) -> About:
    """role: the role that the process's certificate must have.

    Raises:  Unavailable: no process answers there.  PermissionDenied, Unauthenticated: the caller may not ask.
    """
    channel = rpc.channel(address, of=role)
    stub = about_pb2_grpc.AboutServiceStub(channel)
    try:
        with rpc.rpc_errors():
            # The first call opens the connection, so only the second call's duration is measured.
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
