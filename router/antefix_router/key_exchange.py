"""The list of API keys in Redis, for routers on several hosts. A process that can write to Redis cannot forge the list
of keys.

    antefix:api-keys    a hash of three fields: number, book (JSON, as in the file), mac

The MAC of the list is made with the deployment's secret. If somebody puts an old list back, its smaller number reveals
it, and the list is refused.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from antefix.errors import ConfigError, Conflict, Unavailable
from antefix.redis_access import RedisAccess, redis_failures
from antefix.secret import Keyring
from antefix.whole_number import whole_number
from antefix_billing.api_keys import KeyBook, from_json, to_json

_KEY: Final = "antefix:api-keys"
_TIMEOUT_S: Final = 2.0
_PURPOSE: Final = b"api-keys"
# 100,000 keys take some 30 MB.
_BOOK_BYTES_MAX: Final = 64 << 20
# Replaces only the book that the change was made from. It uses one key, so it runs on a cluster as well.
_PUT: Final = """
local number = redis.call('HGET', KEYS[1], 'number')
if number and tonumber(number) >= tonumber(ARGV[1]) then return number end
redis.call('HSET', KEYS[1], 'number', ARGV[1], 'book', ARGV[2], 'mac', ARGV[3])
return false
"""


class ForgedKeys(ConfigError):
    """The value in Redis was not written by this deployment."""


class KeyExchange:
    """Reads and writes the list of API keys in Redis. Used from one event loop."""

    def __init__(self, access: RedisAccess, keyring: Keyring) -> None:
        """Raises:  ConfigError: the URL cannot be used. This does not connect yet."""
        self._redis: Any = access.connect(timeout_s=_TIMEOUT_S)
        self._keyring = keyring

    async def get(self, newer_than: int = -1) -> KeyBook | None:
        """The list of API keys; None if there is no list, or none newer than `newer_than`.

        Raises:  Unavailable: Redis does not answer.  ForgedKeys: the value was not written by this deployment.
        """
        written = await self._ask(self._redis.hget(_KEY, "number"))
        number = whole_number(written)
        # A number that no router wrote hides no book: the signed number decides.
        if written is None or (number is not None and number <= newer_than):
            return None
        found = await self._ask(self._redis.hmget(_KEY, ["book", "mac"]))
        text, mac = (each or b"" for each in found)
        if len(text) > _BOOK_BYTES_MAX or not self._keyring.proves(mac, _PURPOSE, text):
            raise ForgedKeys("the API keys in Redis were not written by this deployment")
        # The signed number counts, not the one in the hash field.
        return from_json(text)

    async def put(self, book: KeyBook) -> None:
        """Raises:  Conflict: another process changed the keys meanwhile.  Unavailable: Redis does not answer."""
        text = to_json(book).encode()
        mac = self._keyring.proof(_PURPOSE, text)
        if await self._ask(self._redis.eval(_PUT, 1, _KEY, book.number, text, mac)) is not None:
            raise Conflict("the API keys in Redis were changed by somebody else meanwhile; look at them and try again")

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, call: Any) -> Any:
        try:
            async with asyncio.timeout(2 * _TIMEOUT_S):
                return await call
        except redis_failures() as err:
            raise Unavailable(f"Redis does not answer: {type(err).__name__}") from err
