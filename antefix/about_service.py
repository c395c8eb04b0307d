"""AboutService: tells operators about a process. `rpc.start_server` adds it to each server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import grpc

from antefix.security.certificates import CERTIFICATE
from antefix.v1 import about_pb2, about_pb2_grpc
from antefix.version import __version__

if TYPE_CHECKING:
    from antefix.security.process_security import ProcessSecurity

MARK_BYTES: Final = 8


class AboutServicer(about_pb2_grpc.AboutServiceServicer):
    """Answers AboutService calls.

    calls: addresses of services that this process calls; services that register with a router are left out.
    """

    def __init__(self, security: ProcessSecurity, calls: Sequence[str] = ()) -> None:
        self._security = security
        self._calls = calls

    async def About(
        self, request: about_pb2.AboutRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> about_pb2.AboutResponse:
        return about_pb2.AboutResponse(
            role=self._security.role.value,
            version=__version__,
            now_unix_ms=time.time_ns() // 1_000_000,
            certificate_ends_unix_ms=self._certificate_ends_ms(),
            secret_marks=self._security.secret_marks(MARK_BYTES),
            calls=self._calls,
        )

    def _certificate_ends_ms(self) -> int:
        if self._security.files is None:
            return 0
        return round(1000 * self._security.files.now().issued()[CERTIFICATE].not_after.timestamp())
