"""Ranges of objects from signed URLs, over plain HTTP and without the client library.

Some answers begin seconds later than all others, even from a server in good order. So a request that waits several
times as long as others is sent once more, over a new connection, and the first answer counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Final
from urllib.parse import urlsplit

from antefix.errors import Unavailable
from antefix.objects.http_ranges import HttpRange, HttpRanges, RangeMissing
from antefix.objects.usual_time import UsualTime

log = logging.getLogger("antefix.objects")

# How long a signed URL is valid: as long as S3 accepts a signed request.
SIGNED_URL: Final = timedelta(minutes=15)
# URLs of this many objects are kept for part of that time. Signing each read took a tenth of its processor time.
_KEPT_MAX: Final = 1024
_KEPT_S: Final = 300.0
_CONNECTIONS: Final = 16
# The time limit until an answer begins.
_OPEN_S: Final = 5.0
# A request is sent again after this many times the mean time until an answer begins, but not before so many seconds. A
# busy machine is often late by a tenth of a second.
_LATE: Final = 8.0
_LATE_S: Final = 0.2
# The mean before the first answer.
_USUAL_S: Final = 0.05
# After a failure no range is read in this way for this time, and for twice as long after each further failure.
_REST_S: Final = 1.0
_REST_S_MAX: Final = 60.0


def reads_directly(endpoint: str, proxies: Mapping[str, str]) -> bool:
    """Whether ranges of an S3 server are read in this way: over plain HTTP without a proxy. Over TLS, Python would
    spend more on the protocol's records than it saves on copies.
    """
    return urlsplit(endpoint).scheme == "http" and not proxies.keys() & {"http", "all"}


class SignedRanges:
    """The object is used from one event loop. sign: makes a URL with which anybody may GET an object, by its name."""

    def __init__(
        self,
        sign: Callable[[str], Awaitable[str]],
        errors: tuple[type[Exception], ...] = (),
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """errors: what `sign` may raise."""
        self._sign = sign
        self._errors: tuple[type[Exception], ...] = (Unavailable, TimeoutError, ValueError, *errors)
        self._clock_s = clock_s
        self._ranges = HttpRanges(_CONNECTIONS)
        self._usual = UsualTime(_USUAL_S, factor=_LATE, least_s=_LATE_S, most_s=_OPEN_S)
        # Requests that were sent again because their answer did not begin.
        self.num_asked_again = 0
        # By name: a signed URL, and until when it is used.
        self._urls: dict[str, tuple[str, float]] = {}
        self._num_failed, self._rests_until_s = 0, 0.0

    async def open(self, name: str, start: int, stop: int) -> HttpRange | None:
        """The answer with these bytes, at least one. None: the bytes must be read through the library, which also finds
        out what is wrong.
        """
        if self._clock_s() < self._rests_until_s:
            return None
        try:
            async with asyncio.timeout(_OPEN_S):
                opened = await self._first_answer(name, start, stop)
        except RangeMissing:
            return None
        except self._errors:
            self._urls.pop(name, None)
            # Reads that fail together count once.
            if self._clock_s() >= self._rests_until_s:
                self._rests_until_s = self._clock_s() + min(_REST_S * 2**self._num_failed, _REST_S_MAX)
                self._num_failed = min(self._num_failed + 1, 10)
            return None
        self._num_failed = 0
        return opened

    def close(self) -> None:
        """Ends all reads."""
        self._ranges.close()

    async def _first_answer(self, name: str, start: int, stop: int) -> HttpRange:
        """Of one request, or of two where the first is late.  Raises:  as `HttpRanges.open`, and what `sign` raises."""
        waiting = {asyncio.ensure_future(self._ask(name, start, stop))}
        try:
            done, _ = await asyncio.wait(waiting, timeout=self._usual.late_s)
            if not done:
                self.num_asked_again += 1
                log.info("%s: no answer within %.1f s; asked again", name, self._usual.late_s)
                waiting.add(asyncio.ensure_future(self._ask(name, start, stop, fresh=True)))
            while True:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for answer in done:
                    waiting.discard(answer)
                    # While another request waits, this one may fail.
                    if not waiting or not isinstance(answer.exception(), self._errors):
                        return answer.result()
        finally:
            for late in waiting:
                _let_go(late)

    async def _ask(self, name: str, start: int, stop: int, *, fresh: bool = False) -> HttpRange:
        began_s = time.monotonic()
        opened = await self._ranges.open(await self._url(name), start, stop, fresh=fresh)
        self._usual.note(time.monotonic() - began_s)
        return opened

    async def _url(self, name: str) -> str:
        url, until_s = self._urls.get(name, ("", 0.0))
        if self._clock_s() >= until_s:
            url = await self._sign(name)
            self._urls.pop(name, None)
            self._urls[name] = (url, self._clock_s() + _KEPT_S)
            if len(self._urls) > _KEPT_MAX:
                del self._urls[next(iter(self._urls))]
        return url


def _let_go(late: asyncio.Future[HttpRange]) -> None:
    """Close an answer that nobody reads, now or when it comes."""
    if not late.done():
        late.cancel()
    elif not late.cancelled() and late.exception() is None:
        late.result().close()
