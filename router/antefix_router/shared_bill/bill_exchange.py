"""Reads and changes the bill's keys in Redis. A value in Redis is replaced only if it is still the value from which the
change was made.

    antefix:bill:request:HASH    one request's account (`antefix_billing.request_account`), with a MAC; for `keep_s`
    antefix:bill:router:SOURCE   a live router's instance; expires after some seconds antefix:bill:routers         the
    sources of all routers that ever took part antefix:bill:epoch           drawn by the first router that finds none,
    so it changes after Redis lost its data antefix:bill:ready:SOURCE    the epoch in which that router wrote all that
    it knows antefix:bill:cursor:SOURCE   the last entry of its ledger that was written to Redis
    antefix:bill:limits:HASH     one tenant's counts, a field for each router (`shared_quotas`)

Each account has a MAC made with the deployment's secret, so a process that can write to Redis cannot change what an
answer costs.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

from antefix.errors import Conflict, Unavailable
from antefix.redis_access import RedisAccess, redis_failures
from antefix.secret import Keyring
from antefix.whole_number import whole_number
from antefix_billing.request_account import RequestAccount, RunningAt

PREFIX: Final = "antefix:bill:"
# A live router renews its key each second.
ALIVE_MS: Final = 5000
_TIMEOUT_S: Final = 1.0
_NUM_TRIES: Final = 20
_PURPOSE: Final = b"request-account"
_SWAP: Final = """
local found = redis.call('GET', KEYS[1])
if (found or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""

Change = Callable[[RequestAccount], tuple[RequestAccount, Decimal] | None]


class BillExchange:
    """Used from one event loop. All methods raise Unavailable if Redis does not answer."""

    def __init__(self, access: RedisAccess, keyring: Keyring, *, keep_s: float) -> None:
        """keep_s: how long a request's account is kept."""
        self._redis: Any = access.connect(timeout_s=_TIMEOUT_S)
        self._keyring = keyring
        self._keep_ms = round(1000 * keep_s)

    async def account(self, key: str) -> RequestAccount:
        return self._opened(key, await self.ask(self._redis.get(_name(key))))

    async def change(self, key: str, change: Change) -> tuple[RequestAccount, Decimal] | None:
        """Replace the account of a request if it is unchanged since it was read.

        change: called with the present account; it may be called again after a conflict. None leaves the account as it
        is.
        Raises:  Conflict: other routers keep changing it.
        """
        for _ in range(_NUM_TRIES):
            found = await self.ask(self._redis.get(_name(key)))
            changed = change(self._opened(key, found))
            if changed is None:
                return None
            text = self._sealed(key, changed[0])
            if await self.ask(self._redis.eval(_SWAP, 1, _name(key), found or b"", text, self._keep_ms)):
                return changed
        raise Conflict("other routers are changing the entry of this request in the shared bill; try again")

    async def say_alive(self, me: RunningAt) -> None:
        await self.ask(self._redis.set(f"{PREFIX}router:{me.source}", me.instance, px=ALIVE_MS))
        await self.ask(self._redis.sadd(f"{PREFIX}routers", me.source))

    async def alive(self) -> list[RunningAt]:
        found = []
        for name in await self.ask(self._redis.smembers(f"{PREFIX}routers")):
            source = name.decode()
            instance = await self.ask(self._redis.get(f"{PREFIX}router:{source}"))
            if instance is not None:
                found.append(RunningAt(source=source, instance=instance.decode()))
        return found

    async def epoch(self, drawn: str) -> str:
        """The present epoch of the shared bill; `drawn` becomes the epoch if there was none."""
        await self.ask(self._redis.set(f"{PREFIX}epoch", drawn, nx=True))
        return str((await self.ask(self._redis.get(f"{PREFIX}epoch")) or b"").decode())

    async def epoch_now(self) -> str:
        return str((await self.ask(self._redis.get(f"{PREFIX}epoch")) or b"").decode())

    async def set_ready(self, source: str, epoch: str) -> None:
        await self.ask(self._redis.set(f"{PREFIX}ready:{source}", epoch))

    async def is_ready(self, source: str, epoch: str) -> bool:
        found = await self.ask(self._redis.get(f"{PREFIX}ready:{source}"))
        return bool(found == epoch.encode())

    async def cursor(self, source: str) -> int:
        found = await self.ask(self._redis.get(f"{PREFIX}cursor:{source}"))
        return whole_number(found) or 0

    async def set_cursor(self, source: str, sequence: int) -> None:
        await self.ask(self._redis.set(f"{PREFIX}cursor:{source}", sequence))

    async def run_script(self, script: str, key: str, *args: str | int) -> Any:
        return await self.ask(self._redis.eval(script, 1, key, *args))

    async def close(self) -> None:
        await self._redis.aclose()

    async def ask(self, call: Any) -> Any:
        try:
            async with asyncio.timeout(2 * _TIMEOUT_S):
                return await call
        except redis_failures() as err:
            raise Unavailable(f"Redis does not answer: {type(err).__name__}") from err

    def _sealed(self, key: str, account: RequestAccount) -> bytes:
        text = account.to_json().encode()
        return self._keyring.proof(_PURPOSE, key.encode(), text).hex().encode() + b" " + text

    def _opened(self, key: str, found: bytes | None) -> RequestAccount:
        """Raises:  Unavailable: the account was not written by this deployment."""
        if not found:
            return RequestAccount()
        seal, _, text = found.partition(b" ")
        try:
            mac = bytes.fromhex(seal.decode("ascii"))
        except ValueError:
            mac = b""
        if not self._keyring.proves(mac, _PURPOSE, key.encode(), text):
            raise Unavailable(
                "the shared bill in Redis has an entry for this request that this deployment did not write"
            )
        return RequestAccount.from_json(text)


def _name(key: str) -> str:
    # Ids come from callers and may be long, so the key has a hash.
    return f"{PREFIX}request:{hashlib.blake2b(key.encode(), digest_size=20).hexdigest()}"
