"""Quotas and budgets per tenant: tokens and money in calendar windows (UTC). Reserve at admission, settle at the end.

A reservation takes the most that a request can use, so requests that run together can never pass a limit together;
what was not used is given back at the end. The counts start again from the ledger, so a restart forgets nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from antefix.errors import BudgetExceeded, Overloaded, RateLimited, TooManyRequests
from antefix_billing.pricing import moment_of
from antefix_billing.usage_record import UsageRecord

# About 1 KB each.
_NUM_TENANTS_MAX = 100_000


class LimitWindow(StrEnum):
    MINUTE = "minute"
    DAY = "day"
    MONTH = "month"

    def start(self, moment: datetime) -> datetime:
        moment = moment.replace(second=0, microsecond=0)
        if self is LimitWindow.MINUTE:
            return moment
        day = moment.replace(minute=0, hour=0)
        return day if self is LimitWindow.DAY else day.replace(day=1)

    def end(self, moment: datetime) -> datetime:
        start = self.start(moment)
        if self is LimitWindow.MINUTE:
            return start + timedelta(minutes=1)
        if self is LimitWindow.DAY:
            return start + timedelta(days=1)
        # The 28th plus four days is in the next month, whatever the month.
        return (start.replace(day=28) + timedelta(days=4)).replace(day=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """At most this much in one window; None is no limit. tokens: prompt and output together."""

    window: LimitWindow
    tokens: int | None = None
    money: Decimal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """All that one tenant may use. requests: at the same time."""

    limits: tuple[Limit, ...] = ()
    requests: int | None = None


@dataclass(slots=True)
class _Usage:
    """What one tenant used and holds reserved in one window."""

    start: datetime
    tokens: int = 0
    money: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What a running request may still use; `settle` or `release` it exactly once."""

    tenant: str
    tokens: int
    money: Decimal
    moment: datetime


@dataclass(slots=True)
class _Tenant:
    windows: dict[LimitWindow, _Usage] = field(default_factory=dict)
    num_running: int = 0


class QuotaBook:
    """The counts of all tenants that have limits. Methods may be called from any thread."""

    def __init__(self, tenants: Mapping[str, TenantLimits], default: TenantLimits | None = None) -> None:
        """default: for tenants that are not named."""
        self._limits = dict(tenants)
        self._default = default or TenantLimits()
        self._tenants: dict[str, _Tenant] = {}
        self._mutex = threading.Lock()

    def restore(self, records: Iterable[UsageRecord], now: datetime) -> None:
        """Count what the ledger says was used in the windows that are still running."""
        with self._mutex:
            for record in records:
                moment = moment_of(record.started_us)
                for limit in self.limits_of(record.tenant).limits:
                    if limit.window.start(moment) == limit.window.start(now):
                        usage = self._usage(record.tenant, limit.window, now)
                        usage.tokens += record.prompt_tokens + record.output_tokens
                        usage.money += record.price

    def reserve(self, tenant: str, *, tokens: int, money: Decimal, now: datetime) -> Reservation:
        """Set aside the most that a request can use.

        Raises:  QuotaExceeded: it would pass a limit; `retry_after_s` is when the window ends.  Overloaded: too many
        tenants at once.
        """
        limits = self.limits_of(tenant)
        with self._mutex:
            if len(self._tenants) >= _NUM_TENANTS_MAX:
                self._forget_idle(now)
            state = self._tenants.setdefault(tenant, _Tenant())
            if limits.requests is not None and state.num_running >= limits.requests:
                raise TooManyRequests(
                    f"concurrency limit: {limits.requests} requests of this tenant are running, which is all that may",
                    retry_after_s=1.0,
                )
            for limit in limits.limits:
                usage = self._usage(tenant, limit.window, now)
                left_s = (limit.window.end(now) - now).total_seconds()
                if limit.tokens is not None and usage.tokens + tokens > limit.tokens:
                    raise RateLimited(
                        f"rate limit: {limit.tokens} tokens per {limit.window}, of which {usage.tokens} are used or"
                        f" reserved, and this request may need {tokens}",
                        retry_after_s=left_s,
                    )
                if limit.money is not None and usage.money + money > limit.money:
                    raise BudgetExceeded(
                        f"budget: {limit.money} per {limit.window} does not cover this request",
                        retry_after_s=left_s,
                    )
            for limit in limits.limits:
                usage = self._usage(tenant, limit.window, now)
                usage.tokens += tokens
                usage.money += money
            state.num_running += 1
        return Reservation(tenant=tenant, tokens=tokens, money=money, moment=now)

    def check(self, tenant: str, *, tokens: int = 1, now: datetime) -> None:
        """Whether a request of at least so many tokens could be admitted, before anything is done for it.

        Raises:  QuotaExceeded: a window has not so much left, or no money at all.
        """
        with self._mutex:
            state = self._tenants.get(tenant, _Tenant())
            for limit in self.limits_of(tenant).limits:
                start = limit.window.start(now)
                usage = state.windows.get(limit.window)
                used = usage if usage is not None and usage.start >= start else _Usage(start=start)
                left_s = (limit.window.end(now) - now).total_seconds()
                if limit.tokens is not None and used.tokens + tokens > limit.tokens:
                    raise RateLimited(
                        f"rate limit: {limit.tokens} tokens per {limit.window}, of which {used.tokens} are used or"
                        f" reserved, and this request needs {tokens} at least",
                        retry_after_s=left_s,
                    )
                if limit.money is not None and used.money > limit.money:
                    raise BudgetExceeded(
                        f"budget: {limit.money} per {limit.window} is used up or reserved", retry_after_s=left_s
                    )

    def settle(self, reservation: Reservation, *, tokens: int, money: Decimal) -> None:
        """Replace the reservation by what was used; it counts in the window in which the request was admitted."""
        with self._mutex:
            state = self._tenants[reservation.tenant]
            state.num_running -= 1
            for limit in self.limits_of(reservation.tenant).limits:
                usage = state.windows.get(limit.window)
                if usage is not None and usage.start == limit.window.start(reservation.moment):
                    usage.tokens += tokens - reservation.tokens
                    usage.money += money - reservation.money
            if not state.num_running and not self.limits_of(reservation.tenant).limits:
                del self._tenants[reservation.tenant]  # names come from callers: keep only what counts something

    def release(self, reservation: Reservation) -> None:
        """Nothing was used."""
        self.settle(reservation, tokens=0, money=Decimal(0))

    def used(self, tenant: str, window: LimitWindow, now: datetime) -> tuple[int, Decimal]:
        """Tokens and money used or reserved in the running window."""
        with self._mutex:
            usage = self._usage(tenant, window, now)
            return usage.tokens, usage.money

    def _forget_idle(self, now: datetime) -> None:
        """Drop tenants of whom nothing counts any more. Names come from callers, so there may be any number of them."""
        idle = [
            name
            for name, state in self._tenants.items()
            if not state.num_running and all(u.start < w.start(now) for w, u in state.windows.items())
        ]
        for name in idle:
            del self._tenants[name]
        if len(self._tenants) >= _NUM_TENANTS_MAX:
            raise Overloaded(f"{_NUM_TENANTS_MAX} tenants are being counted", retry_after_s=60.0)

    def limits_of(self, tenant: str) -> TenantLimits:
        return self._limits.get(tenant, self._default)

    def _usage(self, tenant: str, window: LimitWindow, now: datetime) -> _Usage:
        windows = self._tenants.setdefault(tenant, _Tenant()).windows
        start = window.start(now)
        usage = windows.get(window)
        if usage is None or usage.start < start:
            usage = windows[window] = _Usage(start=start)
        return usage
