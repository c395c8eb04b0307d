"""Reads request bodies, with limits on their number, size, time and structure, in all and per tenant.

Limits on request bodies are checked before any work is done. Only the head is needed to know the caller and the body's
length. A tenant that may run no more requests, or has used up its limit, is refused before its body is read.

    head        key, content-length, the tenant's requests, its quotas, room for the tenant
    body        bytes of this body, bytes of all bodies held, time
    JSON        structure: a megabyte of `{}` would become 30 MB of objects; large bodies are parsed in a thread
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from starlette.requests import Request

from antefix.errors import InvalidRequest, Overloaded, TooManyRequests
from antefix_router.encoding import Encoding
from antefix_router.gateway.fields import wrong_value
from antefix_router.gateway.http_errors import TooLarge, TooSlow
from antefix_router.gateway.text_check import may_hold_surrogates, path_of_no_number, path_of_no_text

# Parsing a body of this size takes the event loop some milliseconds, whatever it holds.
_SMALL_BYTES: Final = 1 << 18
# Lists and objects in one body. A conversation of a thousand turns with tools has some thousands.
_CONTAINERS_MAX: Final = 100_000
# Values in a body besides the token ids of a prompt.
_VALUES_MAX: Final = 400_000
# All bodies that are being read or parsed. There is room for several of the largest size.
_HELD_BYTES_MAX: Final = 256 << 20
# The fraction of the shared limits that one tenant may use, if there are several tenants.
_SHARE: Final = 0.75


class Room:
    """Counts the calls in progress, from the end of their heads on, and the memory that their bodies take."""

    def __init__(self, num_max: int, *, held_bytes_max: int = _HELD_BYTES_MAX) -> None:
        self.num_running = 0
        self.held_bytes = 0
        self._num_max = num_max
        self._held_bytes_max = held_bytes_max
        self._by_tenant: Counter[str] = Counter()
        self._held_by_tenant: Counter[str] = Counter()

    @contextlib.contextmanager
    def taken(self, tenant: str = "", *, requests: int | None = None, is_shared: bool = False) -> Iterator[None]:
        """Take a place for a call.  requests: how many of the tenant's calls may be in progress at once.  is_shared:
        there are other tenants, for whom some room is kept.

        Raises:  TooManyRequests.  Overloaded: no room.
        """
        if requests is not None and self._by_tenant[tenant] >= requests:
            raise TooManyRequests(
                f"concurrency limit: {requests} requests of this tenant are running, which is the limit",
                retry_after_s=1.0,
            )
        most = max(1, int(_SHARE * self._num_max)) if is_shared else self._num_max
        if self.num_running >= self._num_max or self._by_tenant[tenant] >= most:
            raise Overloaded(f"{self.num_running} requests are running already", retry_after_s=1.0)
        self.num_running += 1
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self.num_running -= 1
            _take_off(self._by_tenant, tenant, 1)

    @contextlib.contextmanager
    def holding(self, tenant: str, *, is_shared: bool) -> Iterator[_Held]:
        """Counts the memory of a request body until the body is parsed."""
        held = _Held(self, tenant, int(_SHARE * self._held_bytes_max) if is_shared else self._held_bytes_max)
        try:
            yield held
        finally:
            self.held_bytes -= held.nbytes
            _take_off(self._held_by_tenant, tenant, held.nbytes)


class _Held:
    """The memory of one body."""

    def __init__(self, room: Room, tenant: str, most_bytes: int) -> None:
        self.nbytes = 0
        self._room = room
        self._tenant = tenant
        self._most_bytes = most_bytes

    def grow(self, nbytes: int) -> None:
        """Raises:  Overloaded: too much is held already."""
        room = self._room
        if (
            room.held_bytes + nbytes > room._held_bytes_max
            or room._held_by_tenant[self._tenant] + nbytes > self._most_bytes
        ):
            raise Overloaded("too many large request bodies are being read now", retry_after_s=1.0)
        self.nbytes += nbytes
        room.held_bytes += nbytes
        room._held_by_tenant[self._tenant] += nbytes


def _take_off(counts: Counter[str], name: str, number: int) -> None:
    """Subtract from a count, and remove counts of zero: names come from callers, so there may be any number of them."""
    counts[name] -= number
    if counts[name] <= 0:
        del counts[name]


def check_length(request: Request, nbytes_max: int) -> None:
    """Check what the head of a request says about its body. Raises: TooLarge. InvalidRequest: an unknown content
    coding.
    """
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise InvalidRequest(f"content-encoding {coding!r} is not supported: send the body as it is")
    if int(request.headers.get("content-length") or 0) > nbytes_max:
        raise TooLarge(f"the body has more than {nbytes_max} bytes")


async def read_body(request: Request, held: _Held, nbytes_max: int, *, timeout_s: float) -> bytearray:
    """Raises:  TooLarge.  TooSlow.  Overloaded: too much is held already."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                body += piece
                held.grow(len(piece))
                if len(body) > nbytes_max:
                    raise TooLarge(f"the body has more than {nbytes_max} bytes")
    except TimeoutError as err:
        raise TooSlow(f"the body did not arrive within {timeout_s:g} s") from err
    return body


async def parse_body(body: bytearray, encoding: Encoding, *, tenant: str, num_tokens_max: int) -> Any:
    """num_tokens_max: how many token ids the body may hold.

    Raises:  InvalidRequest: it is not JSON, or holds too much.  WrongField: a string in it is not valid text, or a
        number is not finite.
    """
    if len(body) <= _SMALL_BYTES:
        return _parse(body)
    return await encoding.run(len(body), lambda: _parse_large(body, num_tokens_max), tenant=tenant)


def _parse_large(body: bytearray, num_tokens_max: int) -> Any:
    if b"\x00" in body[:4]:
        # Convert to UTF-8 first, as json.loads would, because quotes are searched for in UTF-8.
        body = bytearray(body.decode(json.detect_encoding(body), "replace").encode())
    num_containers, num_values = structure_of(body)
    if num_containers > _CONTAINERS_MAX:
        raise InvalidRequest(
            f"the request body has {num_containers} lists and objects, more than the limit of {_CONTAINERS_MAX}"
        )
    if num_values > (most := _VALUES_MAX + num_tokens_max):
        raise InvalidRequest(f"the request body has {num_values} values, more than the limit of {most}")
    return _parse(body)


def structure_of(body: bytes | bytearray) -> tuple[int, int]:
    """How many lists and objects the JSON text begins, and how many values follow a comma. Exact for valid JSON. The
    JSON text is not parsed, and most of the time runs without Python's lock.
    """
    plain = np.frombuffer(bytes(body).replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    # The parity of the number of quotes before a byte says whether the byte is inside a string. uint8 wraps around,
    # which keeps the parity.
    outside = np.cumsum(plain == ord('"'), dtype=np.uint8) & 1 == 0
    found = np.bincount(plain[outside], minlength=256)
    return int(found[ord("{")] + found[ord("[")]), int(found[ord(",")])


def _parse(body: bytearray) -> Any:
    odd: list[float] = []

    def number_of(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            odd.append(number)
        return number

    try:
        value = json.loads(body, parse_float=number_of, parse_constant=number_of)
    except (ValueError, RecursionError) as err:
        raise InvalidRequest(f"the body is not JSON: {err}") from err
    if odd and (path := path_of_no_number(value)) is not None:
        # Python's parser accepts more than JSON allows. An answer that repeats such a value could not be written.
        raise wrong_value(path or "the request body", " must be a finite number, as JSON has no NaN and no infinity")
    if may_hold_surrogates(body) and (path := path_of_no_text(value)) is not None:
        why = " is not text: it holds half of a surrogate pair, which UTF-8 cannot write"
        raise wrong_value(path or "the request body", why)
    return value
