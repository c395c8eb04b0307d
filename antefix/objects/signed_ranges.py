"""Ranges of objects from signed URLs, over plain HTTP and without the client library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Final
from urllib.parse import urlsplit

from antefix.errors import Unavailable
from antefix.objects.http_ranges import HttpRange, HttpRanges, RangeMissing

# How long a signed URL is valid: as long as S3 accepts a signed request.
SIGNED_URL: Final = timedelta(minutes=15)
# URLs of this many objects are kept for part of that time. Signing each read took a tenth of its processor time.
_KEPT_MAX: Final = 1024
_KEPT_S: Final = 300.0
_CONNECTIONS: Final = 16
# The time limit until an answer begins.
_OPEN_S: Final = 5.0
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
                opened = await self._ranges.open(await self._url(name), start, stop)
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

    async def _url(self, name: str) -> str:
        url, until_s = self._urls.get(name, ("", 0.0))
        if self._clock_s() >= until_s:
            url = await self._sign(name)
            self._urls.pop(name, None)
            self._urls[name] = (url, self._clock_s() + _KEPT_S)
            if len(self._urls) > _KEPT_MAX:
                del self._urls[next(iter(self._urls))]
        return url
