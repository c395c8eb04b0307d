"""Parses HTTP/1.1 strictly: a message that another HTTP parser could divide differently is refused.

uvicorn's parser, h11, accepts lines that end in LF alone, folded headers, chunk extensions, a length next to chunks,
and a repeated length. Each of these irregular forms is harmless until a proxy interprets the same bytes differently.
In that case the rest of one client's request becomes the beginning of another client's request (request smuggling). So
such messages are answered with 400 and a closed connection, and nothing after them is read.
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
# LF without CR, CR without LF, and characters that no header may hold.
_BAD_BYTES: Final = re.compile(rb"(?<!\r)\n|\r(?!\n)|\x00")
_FOLDED: Final = re.compile(rb"\n[ \t]")
_FRAMING: Final = re.compile(
    rb"(?:\A|\n)(content-length|transfer-encoding)[ \t]*:[ \t]*([^\r]*?)[ \t]*\r", re.IGNORECASE
)
# A length with more digits is beyond any allowed body.
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")
_CHUNK_HEAD: Final = re.compile(rb"[0-9A-Fa-f]{1,15}\r\n")
_CHUNK_HEAD_BYTES_MAX: Final = 17


class _StrictBuffer(ReceiveBuffer):
    """The received bytes, which are checked before h11 reads lines from them."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """The lines of a request's head, or of the trailer after its last chunk."""
        if self._data[:2] != b"\r\n":
            end = _BLANK_LINE.search(self._data)
            head = bytes(self._data[: end.end()]) if end is not None else bytes(self._data[:1])
            if (why := _fault_of(head)) and (end is not None or head == b"\n"):
                raise h11.LocalProtocolError(why)
        return super().maybe_extract_lines()

    def maybe_extract_next_line(self) -> bytearray | None:
        """The line of a chunked body that begins a chunk."""
        line = super().maybe_extract_next_line()
        is_good = _CHUNK_HEAD.fullmatch(line) if line is not None else len(self) <= _CHUNK_HEAD_BYTES_MAX
        if not is_good:
            raise h11.LocalProtocolError("each chunk of a request body must begin with its size and nothing else")
        return line


def _fault_of(head: bytes) -> str:
    """Why another parser could divide these lines differently; empty if no parser could."""
    if _BAD_BYTES.search(head):
        return "a line must end in CRLF, and hold no NUL"
    if _FOLDED.search(head):
        return "a header must be on one line"
    framing = [(name.lower(), value.lower()) for name, value in _FRAMING.findall(head)]
    if len(framing) > 1:
        return "a body's length must be given once: by content-length or by chunks"
    for name, value in framing:
        if name == b"content-length":
            is_good = _LENGTH.fullmatch(value) is not None
        else:
            is_good = value == b"chunked" and head[: head.index(b"\r")].endswith(b" HTTP/1.1")
        if not is_good:
            return f"{name.decode()} must be a number, or chunked"
    return ""


class HttpFaults:
    """num_malformed: connections that were closed because the bytes received were not a valid request."""

    def __init__(self) -> None:
        self.num_malformed = 0


class StrictProtocol(H11Protocol):
    """One HTTP connection. http_faults, http_connections: shared by the connections of a server; `strict_protocol` sets
    them.
    """

    http_faults: HttpFaults
    http_connections: Connections

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # h11 offers no other hook. A test fails if a version of h11 takes lines from somewhere else.
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
        was_waiting, before, was_early = self._is_between(), self.cycle, self._is_answered_early()
        if was_waiting and not self.conn.trailing_data[0] and not was_early:
            # The time limit runs from a head's first byte. Later bytes of the head do not restart it.
            self._wait_for_head(self.http_connections.head_s)
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()
        elif was_early and self._is_between() and not (self._is_answered_early() or self.conn.trailing_data[0]):
            # The body has ended that nobody read, so the connection is kept as after any other answer.
            self._wait_for_head(self.http_connections.idle_s)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            # This covers a pipelined request that follows another one.
            self._stop_waiting()
            self.http_connections.busy(self)

    def on_response_complete(self) -> None:
        if self._is_counted:
            self.http_connections.idle(self)
        if self.conn.trailing_data[0] or self._is_answered_early():
            # The next head has begun already, or the client has so long to end a body that nobody reads.
            self._wait_for_head(self.http_connections.head_s)
        super().on_response_complete()
        # The unsent rest of a closed connection would wait for its reader without end.
        self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def drop(self) -> None:
        self.transport.abort()

    def _is_between(self) -> bool:
        """Whether no request is in progress on the connection."""
        return self.cycle is None or self.cycle.response_complete

    def _is_answered_early(self) -> bool:
        """Whether the body of a request that has its answer is still coming."""
        return self.conn.their_state is h11.SEND_BODY

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
        """Close a connection whose client reads nothing: it holds a request's place, a descriptor and the memory of
        unsent data.
        """
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
            # The answer has begun, and can no longer become an error.
            self.transport.close()


def strict_protocol(faults: HttpFaults, connections: Connections) -> type[H11Protocol]:
    """The protocol class of which uvicorn makes an instance for each connection of one server."""

    class ServersProtocol(StrictProtocol):
        http_faults = faults
        http_connections = connections

    return ServersProtocol
