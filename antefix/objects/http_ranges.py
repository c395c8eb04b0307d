"""Reads ranges of objects over plain HTTP straight into the caller's buffers.

A client library returns a range as new memory, which is copied again into a pool's blocks. Here the kernel writes the
bytes into the blocks, and each record is checked while it is in the processor's cache. Retries are not done here: what
fails, the caller reads with its library (`CloudBucket.read`).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import struct
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final
from urllib.parse import urlsplit

from antefix.errors import Unavailable

# The time limit of one wait for the server, as the library's limit of a request.
_WAIT_S: Final = 30
_CONNECT_S: Final = 3.0
# Servers and gateways close idle connections, often after a minute; a request on such a connection is sent again.
_IDLE_S: Final = 20.0
# The answer's head is read with up to this many bytes of its body.
_AHEAD_BYTES: Final = 64 << 10


class RangeMissing(Exception):
    """The server says that there is no such object."""


class HttpRange:
    """A `RangeSource` that reads the body of one answer. A wait of more than 30 s fails."""

    def __init__(self, pool: HttpRanges, link: _Link, ahead: bytes, nbytes: int) -> None:
        self._pool = pool
        self._link = link
        # The part of the body that was read with the answer's head.
        self._ahead = memoryview(ahead)
        self._nbytes_left = nbytes
        self._nbytes_skipped = 0

    def take(self, nbytes: int) -> memoryview:
        # What was skipped before comes with the same call of the kernel.
        skipped, self._nbytes_skipped = self._nbytes_skipped, 0
        buffer = memoryview(bytearray(skipped + nbytes))
        self._receive(buffer)
        return buffer[skipped:]

    def fill(self, into: memoryview) -> None:
        if self._nbytes_skipped:
            self.take(0)
        self._receive(into)

    def skip(self, nbytes: int) -> None:
        self._nbytes_skipped += nbytes

    def abort(self) -> None:
        self._link.shut_down()

    def finish(self) -> None:
        # The padding of the last record, so that the connection can be used again.
        if self._nbytes_left == self._nbytes_skipped <= _AHEAD_BYTES:
            with contextlib.suppress(Unavailable):
                self.take(0)

    def close(self) -> None:
        self._pool.give_back(self._link, is_usable=not self._nbytes_left)

    def _receive(self, into: memoryview) -> None:
        at = min(self._ahead.nbytes, into.nbytes)
        into[:at] = self._ahead[:at]
        self._ahead = self._ahead[at:]
        while at < into.nbytes:
            try:
                # One call for all bytes, so that a busy interpreter is not entered for each packet.
                count = self._link.socket.recv_into(into[at:], 0, socket.MSG_WAITALL)
            except OSError as err:
                raise Unavailable(f"{self._link.host}: the answer broke off: {err}") from err
            if not count:
                raise Unavailable(f"{self._link.host}: the answer broke off")
            at += count
        self._nbytes_left -= into.nbytes


class HttpRanges:
    """Connections to one or several hosts. Used from one event loop."""

    def __init__(self, num_max: int) -> None:
        """num_max: reads at a time, and how many idle connections are kept."""
        # Twice as many requests may wait for an answer: each may be sent again while the first one waits.
        self._threads: Final = ThreadPoolExecutor(2 * num_max, thread_name_prefix="antefix-ranges")
        self._num_max = num_max
        self._idle: deque[_Link] = deque()
        self._links: set[_Link] = set()

    async def open(self, url: str, start: int, stop: int, *, fresh: bool = False) -> HttpRange:
        """The server's answer to a GET of bytes [start, stop), at least one, before its body is read. A cancelled call
        ends its connection.

        fresh: over a new connection.
        Raises:  RangeMissing.  Unavailable: no such answer; the message has no part of the URL's query.
        """
        asked = _Asked()
        opening = self._threads.submit(self._open, url, start, stop, asked, fresh)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            asked.give_up()
            opening.add_done_callback(_close_opened)
            raise

    def close(self) -> None:
        """Ends all reads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for link in list(self._links):
            link.shut_down()
        while self._idle:
            self._drop(self._idle.pop())

    def give_back(self, link: _Link, *, is_usable: bool) -> None:
        """Called from any thread."""
        if not is_usable or link.closes:
            self._drop(link)
            return
        link.idle_since_s = time.monotonic()
        self._idle.append(link)
        # Other threads may give back theirs at the same time, so count afterwards.
        with contextlib.suppress(IndexError):
            while len(self._idle) > self._num_max:
                self._drop(self._idle.popleft())

    def _open(self, url: str, start: int, stop: int, asked: _Asked, fresh: bool) -> HttpRange:
        parts = urlsplit(url)
        host, target = parts.netloc, f"{parts.path}?{parts.query}"
        if parts.scheme != "http":
            raise Unavailable(f"{host}: {parts.scheme} is not read in this way")
        link = None if fresh else self._idle_link(host)
        try:
            if link is not None:
                try:
                    asked.goes_over(link)
                    return HttpRange(self, link, link.ask(target, start, stop), stop - start)
                except (OSError, http.client.HTTPException):
                    # The server may have closed this connection meanwhile.
                    self._drop(link)
            link = _Link(host)
            self._links.add(link)
            asked.goes_over(link)
            return HttpRange(self, link, link.ask(target, start, stop), stop - start)
        except BaseException as err:
            if link is not None:
                self._drop(link)
            if isinstance(err, (OSError, http.client.HTTPException)):
                raise Unavailable(f"{host}: {err or type(err).__name__}") from err
            raise

    def _idle_link(self, host: str) -> _Link | None:
        with contextlib.suppress(IndexError):
            while True:
                link = self._idle.pop()
                if link.host == host and time.monotonic() - link.idle_since_s < _IDLE_S:
                    return link
                self._drop(link)
        return None

    def _drop(self, link: _Link) -> None:
        self._links.discard(link)
        link.close()


class _Asked:
    """One request. `give_up` makes the thread that waits for its answer fail at once; called from another thread."""

    def __init__(self) -> None:
        self._link: _Link | None = None
        self._is_given_up = False

    def goes_over(self, link: _Link) -> None:
        """Raises:  Unavailable: the request was given up."""
        self._link = link
        if self._is_given_up:
            raise Unavailable(f"{link.host}: the request was given up")

    def give_up(self) -> None:
        self._is_given_up = True
        if self._link is not None:
            self._link.shut_down()


class _Link:
    """One connection.  closes: the server closes it after this answer."""

    def __init__(self, host: str) -> None:
        """Raises:  OSError: the host does not answer."""
        self.host: Final = host
        self.idle_since_s = 0.0
        self.closes = False
        self._response: http.client.HTTPResponse | None = None
        self._connection = http.client.HTTPConnection(host, timeout=_CONNECT_S)
        self._connection.connect()
        self.socket: Final[socket.socket] = self._connection.sock
        # Blocking, with the kernel's time limits: only then does one call wait for all of its bytes.
        self.socket.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", _WAIT_S, 0))

    def ask(self, target: str, start: int, stop: int) -> bytes:
        """Send the request and read the answer's head. Returns the first bytes of the body.

        Raises:  OSError, HTTPException.  RangeMissing.  Unavailable: an answer without these bytes.
        """
        self._connection.request("GET", target, headers={"Range": f"bytes={start}-{stop - 1}"})
        response = self._response = self._connection.getresponse()
        if response.status == http.client.NOT_FOUND:
            raise RangeMissing
        if response.status != http.client.PARTIAL_CONTENT or response.length != stop - start:
            raise Unavailable(f"{self.host}: status {response.status} with {response.length} bytes")
        self.closes = response.will_close
        # The rest of the body is read from the socket. `fp` is http.client's file over the socket, and `read1` returns
        # what that has read ahead.
        ahead: bytes = response.fp.read1(min(_AHEAD_BYTES, stop - start))
        if not self.closes:
            # Only then may the connection send its next request. Otherwise this would close the socket.
            response.close()
        return ahead

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()
        self.socket.close()


def _close_opened(opening: Future[HttpRange]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
