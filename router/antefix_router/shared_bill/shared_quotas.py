"""Limits across all routers. Each router writes its own counts into a hash per tenant, and reserves if the sum fits the
limits.

A router's field holds its total counts, not changes, so it can be written repeatedly, and is written again after Redis
lost its data. A dead router's reservations no longer count; what was used counts until the window ends. While Redis is
down, each router checks the limits with its own counts alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from contextvars import Context
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from typing import Any, Final
from weakref import WeakValueDictionary

from antefix.errors import Unavailable
from antefix_billing.limits import (
    LimitPassed,
    LimitWindow,
    QuotaBook,
    Reservation,
    TenantLimits,
    WindowUse,
    limit_error,
)
from antefix_router.shared_bill.bill_exchange import ALIVE_MS, PREFIX, BillExchange

# Redis adds in floating point (double). In billionths of a currency it is exact up to nine million.
_MONEY_UNITS: Final = 10**9
_KEEP_S: Final = 32 * 86400

# A field is "UNTIL COUNTS". Reservations and running requests in it count until UNTIL (ms of Redis' clock), which a
# live router extends with each beat. COUNTS are {running, windows = {name: {start, tokens, money, requests,
# reserved_tokens, reserved_money}}}.
_WRITE: Final = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function write()
  redis.call('HSET', KEYS[1], ARGV[1], string.format('%d', now + ARGV[3]) .. ' ' .. ARGV[2])
  redis.call('EXPIRE', KEYS[1], ARGV[4])
end
"""
# KEYS[1]: the tenant's hash.  ARGV: this router's source, its counts, how long they are valid (ms), how long the hash
# is kept (s), and the limits. Returns which limit is passed.
_RESERVE: Final = (
    _WRITE
    + """
local limits, all, running = cjson.decode(ARGV[5]), {}, 0
local rows = redis.call('HGETALL', KEYS[1])
for i = 1, #rows, 2 do
  if rows[i] ~= ARGV[1] then
    local till, text = string.match(rows[i + 1], '^(%d+) (.*)$')
    local counts = cjson.decode(text)
    counts.lives = tonumber(till) > now
    table.insert(all, counts)
  end
end
local mine = cjson.decode(ARGV[2])
mine.lives = true
table.insert(all, mine)
for _, counts in ipairs(all) do
  if counts.lives then running = running + counts.running end
end
if limits.requests and running > limits.requests then return cjson.encode({what = 'running'}) end
local told = {}
for _, limit in ipairs(limits.windows) do
  local sums = {tokens = 0, money = 0, requests = 0}
  for _, counts in ipairs(all) do
    local window = counts.windows[limit.name]
    if window and window.start == limit.start then
      sums.tokens = sums.tokens + window.tokens
      sums.money = sums.money + window.money
      sums.requests = sums.requests + window.requests
      if counts.lives then
        sums.tokens = sums.tokens + window.reserved_tokens
        sums.money = sums.money + window.reserved_money
      end
    end
  end
  local own = mine.windows[limit.name]
  if own then
    told[limit.name] = {
      start = limit.start,
      tokens = sums.tokens - own.tokens - own.reserved_tokens,
      requests = sums.requests - own.requests
    }
  end
  for _, what in ipairs({'tokens', 'money', 'requests'}) do
    if limit[what] and sums[what] > limit[what] then
      return cjson.encode({what = what, window = limit.name, number = limit.number, used = sums[what]})
    end
  end
end
write()
return cjson.encode(told)
"""
)
_TELL: Final = _WRITE + "write()\nreturn false\n"


class SharedQuotas:
    """One router's part of the shared limits. book: the router's own counts, which alone are checked while Redis is
    down.
    """

    def __init__(self, exchange: BillExchange, book: QuotaBook, source: str) -> None:
        self._exchange = exchange
        self._book = book
        self._source = source
        self._changed: set[str] = set()
        # The counts of all other routers at the last reservation, by tenant and window.
        self._others: dict[str, dict[str, Any]] = {}
        self._telling: asyncio.Task[None] | None = None
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.num_alone = 0

    async def reserve(self, tenant: str, *, tokens: int, money: Decimal, now: datetime) -> Reservation:
        """As `QuotaBook.reserve`, but with the counts of all routers.

        Raises:  QuotaExceeded, Overloaded.
        """
        limits = self._book.limits_of(tenant)
        if not limits.limits and limits.requests is None:
            return self._book.reserve(tenant, tokens=tokens, money=money, now=now)
        # One at a time: if two requests arrive together and only one fits, one of them must succeed.
        async with self._turns.setdefault(tenant, asyncio.Lock()):
            reservation = self._book.reserve(tenant, tokens=tokens, money=money, now=now)
            await self._hold(reservation, limits, now)
        return reservation

    async def _hold(self, reservation: Reservation, limits: TenantLimits, now: datetime) -> None:
        tenant = reservation.tenant
        windows = [
            {
                "name": limit.window.value,
                "number": number,
                "start": limit.window.start(now).isoformat(),
                **({} if limit.tokens is None else {"tokens": limit.tokens}),
                **({} if limit.money is None else {"money": _units(limit.money)}),
                **({} if limit.requests is None else {"requests": limit.requests}),
            }
            for number, limit in enumerate(limits.limits)
        ]
        asked = {"windows": windows, **({} if limits.requests is None else {"requests": limits.requests})}
        try:
            counts = self._counts(tenant, now)
            answer = await self._exchange.run_script(
                _RESERVE, _name(tenant), self._source, counts, ALIVE_MS, _KEEP_S, json.dumps(asked)
            )
        except Unavailable:
            self.num_alone += 1
            self._changed.add(tenant)
            return
        except BaseException:
            self._book.release(reservation)
            raise
        passed: dict[str, Any] = json.loads(answer)
        if "what" not in passed:
            self._others[tenant] = passed
        else:
            self._book.release(reservation)
            what = LimitPassed(passed["what"])
            number = passed.get("number")
            limit = None if number is None else limits.limits[int(number)]
            raise limit_error(what, limits, limit, now, used=int(passed.get("used", 0)), needs=reservation.tokens)

    def others(self, tenant: str) -> dict[tuple[LimitWindow, LimitPassed], int]:
        """The other routers' counts at the last reservation for this tenant, in limit windows that are still
        running.
        """
        now, found = datetime.now(UTC), {}
        for name, counts in self._others.get(tenant, {}).items():
            window = LimitWindow(name)
            if counts["start"] == window.start(now).isoformat():
                found[window, LimitPassed.TOKENS] = int(counts["tokens"])
                found[window, LimitPassed.REQUESTS] = int(counts["requests"])
        return found

    def changed(self, tenant: str) -> None:
        """Record that the tenant's counts differ from those in Redis. The counts are written at once or, if that fails,
        with a later heartbeat.
        """
        self._changed.add(tenant)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell_changed(), context=Context())

    async def close(self) -> None:
        if self._telling is not None:
            await asyncio.gather(self._telling, return_exceptions=True)

    async def _tell_changed(self) -> None:
        with contextlib.suppress(Unavailable):
            while self._changed:
                await self.tell()

    async def tell(self, *, all_again: bool = False) -> None:
        """Write the counts that changed, and extend the reservations, in Redis.  Raises:  Unavailable."""
        now = datetime.now(UTC)
        if all_again:
            self._changed |= self._book.counted_tenants()
        for tenant in self._changed | self._book.running_tenants():
            limits = self._book.limits_of(tenant)
            self._changed.discard(tenant)
            if limits.limits or limits.requests is not None:
                counts = self._counts(tenant, now)
                try:
                    await self._exchange.run_script(_TELL, _name(tenant), self._source, counts, ALIVE_MS, _KEEP_S)
                except Unavailable:
                    self._changed.add(tenant)
                    raise

    def _counts(self, tenant: str, now: datetime) -> str:
        running, windows = self._book.counts(tenant, now)
        return json.dumps(
            {
                "running": running,
                "windows": {name.value: _window(counts) for name, counts in windows.items()},
            }
        )


def _window(counts: WindowUse) -> dict[str, str | int]:
    return {
        "start": counts.start.isoformat(),
        "tokens": counts.tokens,
        "money": _units(counts.money),
        "requests": counts.requests,
        "reserved_tokens": counts.reserved_tokens,
        "reserved_money": _units(counts.reserved_money),
    }


def _units(money: Decimal) -> int:
    return int((money * _MONEY_UNITS).to_integral_value(ROUND_CEILING))


def _name(tenant: str) -> str:
    return f"{PREFIX}limits:{hashlib.blake2b(tenant.encode(), digest_size=20).hexdigest()}"
