"""Reads HTTP/1.1 as strictly as a proxy in front of it must: what two readers could cut differently is no request.

uvicorn's parser, h11, takes lines that end in LF alone, folded headers, chunk extensions, a length next to chunks, and
a length that is said twice. Each is harmless until a proxy reads the same bytes otherwise: then the rest of one
client's request becomes the beginning of another's. So these end in 400 and a closed connection; nothing behind them is
read.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final

import h11
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol

from antefix_router.gateway.connections import Connections

_BLANK_LINE: Final = re.compile(rb"\n\r?\n")
# LF without CR, CR without LF, and what no header may hold.
_BAD_BYTES: Final = re.compile(rb"(?<!\r)\n|\r(?!\n)|\x00")
_FOLDED: Final = re.compile(rb"\n[ \t]")
_FRAMING: Final = re.compile(
    rb"(?:\A|\n)(content-length|transfer-encoding)[ \t]*:[ \t]*([^\r]*?)[ \t]*\r", re.IGNORECASE
)
# More digits are more than any body may have.
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")
_CHUNK_HEAD: Final = re.compile(rb"[0-9A-Fa-f]{1,15}\r\n")
_CHUNK_HEAD_BYTES_MAX: Final = 17


class _StrictBuffer(ReceiveBuffer):
    """What came in, looked at before h11 takes lines out of it."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """A request's head, or what stands behind its last chunk."""
        if self._data[:2] != b"\r\n":
            end = _BLANK_LINE.search(self._data)
            head = bytes(self._data[: end.end()]) if end is not None else bytes(self._data[:1])
            if (why := _fault_of(head)) and (end is not None or head == b"\n"):
                raise h11.LocalProtocolError(why)
        return super().maybe_extract_lines()

    def maybe_extract_next_line(self) -> bytearray | None:
        """What a chunk begins with."""
        line = super().maybe_extract_next_line()
        is_good = _CHUNK_HEAD.fullmatch(line) if line is not None else len(self) <= _CHUNK_HEAD_BYTES_MAX
        if not is_good:
            raise h11.LocalProtocolError("a chunk begins with its size alone")
        return line


def _fault_of(head: bytes) -> str:
    """Why another reader could cut these lines differently; empty where it could not."""
    if _BAD_BYTES.search(head):
        return "a line must end in CRLF, and hold no NUL"
    if _FOLDED.search(head):
        return "a header must stand in one line"
    framing = [(name.lower(), value.lower()) for name, value in _FRAMING.findall(head)]
    if len(framing) > 1:
        return "a body's length is said once: by content-length or by chunks"
    for name, value in framing:
        if name == b"content-length":
            is_good = _LENGTH.fullmatch(value) is not None
        else:
            is_good = value == b"chunked" and head[: head.index(b"\r")].endswith(b" HTTP/1.1")
        if not is_good:
            return f"{name.decode()} must be a number, or chunked"
    return ""


class HttpFaults:
    """num_malformed: connections that were closed because what came was no request."""

    def __init__(self) -> None:
        self.num_malformed = 0


class StrictProtocol(H11Protocol):
    """One connection. http_faults, http_connections: its server's, which `strict_protocol` sets."""

    http_faults: HttpFaults
    http_connections: Connections

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # h11 has no other way in. A test fails where a version of it takes lines from somewhere else.
        self.conn._receive_buffer = _StrictBuffer()
        self.address = ""
        self._is_counted = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        super().connection_made(transport)
        self._is_counted = self.http_connections.enter(self)
        if self._is_counted:
            self._wait_for_head(self.http_connections.idle_s)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching()
        if self._is_counted:
            self._is_counted = False
            self.http_connections.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_waiting, before = self._is_between(), self.cycle
        if was_waiting and not self.conn.trailing_data[0]:
            # From a head's first byte on; what trickles in does not begin it again.
            self._wait_for_head(self.http_connections.head_s)
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            # Also one that came in a pipeline, behind another one's answer.
            self._stop_waiting()
            self.http_connections.busy(self)

    def on_response_complete(self) -> None:
        if self._is_counted:
            self.http_connections.idle(self)
        if self.conn.trailing_data[0]:
            # The next head has begun already.
            self._wait_for_head(self.http_connections.head_s)
        super().on_response_complete()
        # What is left of it when the connection is closed would wait for its reader for ever.
        self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def drop(self) -> None:
        self.transport.abort()

    def _is_between(self) -> bool:
        """No request is at work."""
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_head(self, seconds: float) -> None:
        self._stop_waiting()
        self._head_timer = self.loop.call_later(seconds, self._no_head)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _no_head(self) -> None:
        self.http_connections.num_silent += 1
        self.transport.abort()

    def _watch_reader(self) -> None:
        """A client that reads nothing holds a request's place, a descriptor and what was sent to it."""
        self._stop_watching()
        if unread := self.transport.get_write_buffer_size():
            self._unread_timer = self.loop.call_later(self.http_connections.unread_s, self._look_again, unread)

    def _look_again(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() < unread:
            self._watch_reader()
        else:
            self.http_connections.num_unread += 1
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def send_400_response(self, msg: str) -> None:
        self.http_faults.num_malformed += 1
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            # Its answer has begun, and cannot become another one.
            self.transport.close()


def strict_protocol(faults: HttpFaults, connections: Connections) -> type[H11Protocol]:
    """What uvicorn makes one of for each connection of one server."""

    class ServersProtocol(StrictProtocol):
        http_faults = faults
        http_connections = connections

    return ServersProtocol
