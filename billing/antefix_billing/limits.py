"""Quotas and budgets per tenant: tokens and money in calendar windows (UTC). Use is reserved at admission, and settled
at the end of the request.

A reservation takes the most that a request can use, so concurrent requests can never exceed a limit together. The
unused part is given back when the request ends. After a restart the counts are read from the ledger, so that no use is
lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from antefix.errors import BudgetExceeded, Overloaded, QuotaExceeded, RateLimited, TooManyRequests
from antefix_billing.pricing import moment_of
from antefix_billing.usage_record import UsageRecord

# How many tenants are counted at a time. Each takes about 1 KB.
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
        # Adding four days to the 28th gives a day in the next month, whatever the month.
        return (start.replace(day=28) + timedelta(days=4)).replace(day=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most that a tenant may use in one window. None means that there is no limit. tokens: prompt and output
    together. requests: admitted requests.
    """

    window: LimitWindow
    tokens: int | None = None
    money: Decimal | None = None
    requests: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """All limits of one tenant.  requests: how many may run at the same time.

    share: the tenant's weight when several tenants want the same workers. Workers' capacity that no other tenant wants
    is free to this tenant, whatever its share.
    """

    limits: tuple[Limit, ...] = ()
    requests: int | None = None
    share: int = 1


@dataclass(slots=True)
class WindowUse:
    """What one tenant has used and holds reserved in one window."""

    start: datetime
    tokens: int = 0
    money: Decimal = Decimal(0)
    requests: int = 0
    reserved_tokens: int = 0
    reserved_money: Decimal = Decimal(0)


class LimitPassed(StrEnum):
    """Which limit a request would exceed. running: the limit on requests at the same time."""

    RUNNING = "running"
    TOKENS = "tokens"
    MONEY = "money"
    REQUESTS = "requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """The state of a limit on tokens or requests: the limit, how much is left, and when the full amount is available
    again.
    """

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What a running request may still use. Either `settle` or `release` must be called on it, exactly once."""

    tenant: str
    tokens: int
    money: Decimal
    moment: datetime
    windows: frozenset[LimitWindow] = frozenset()


@dataclass(slots=True)
class _Tenant:
    windows: dict[LimitWindow, WindowUse] = field(default_factory=dict)
    num_running: int = 0


def _windows_of(limits: TenantLimits) -> frozenset[LimitWindow]:
    return frozenset(limit.window for limit in limits.limits)


def limit_error(
    what: LimitPassed, limits: TenantLimits, limit: Limit | None, now: datetime, *, used: int = 0, needs: int = 0
) -> QuotaExceeded:
    """The error for a request that exceeds a limit. limit: None: the request exceeds the limit on requests at the same
    time.
    """
    if limit is None:
        return TooManyRequests(
            f"concurrency limit: {limits.requests} requests of this tenant are running, which is the limit",
            retry_after_s=1.0,
        )
    left_s = (limit.window.end(now) - now).total_seconds()
    if what is LimitPassed.TOKENS:
        return RateLimited(
            f"rate limit: {limit.tokens} tokens per {limit.window}, of which {used} are used or reserved, and this"
            f" request may need {needs}",
            retry_after_s=left_s,
        )
    if what is LimitPassed.REQUESTS:
        return TooManyRequests(
            f"rate limit: {limit.requests} requests per {limit.window}, which this tenant has sent",
            retry_after_s=left_s,
        )
    return BudgetExceeded(
        f"the tenant's budget of {limit.money} per {limit.window} does not cover this request", retry_after_s=left_s
    )


class QuotaBook:
    """The counts of all tenants that have limits. The quota methods may be called from any thread."""

    def __init__(self, tenants: Mapping[str, TenantLimits], default: TenantLimits | None = None) -> None:
        """default: the limits of tenants that are not named."""
        self._limits = dict(tenants)
        self._default = default or TenantLimits()
        self._tenants: dict[str, _Tenant] = {}
        self._mutex = threading.Lock()

    def restore(self, records: Iterable[UsageRecord], now: datetime) -> None:
        """Count the use in the ledger's records for the limit windows that are still running."""
        with self._mutex:
            for record in records:
                moment = moment_of(record.started_us)
                for window in _windows_of(self.limits_of(record.tenant)):
                    if window.start(moment) == window.start(now):
                        usage = self._usage(record.tenant, window, now)
                        usage.tokens += record.prompt_tokens + record.output_tokens
                        usage.money += record.price
                        usage.requests += 1

    def reserve(self, tenant: str, *, tokens: int, money: Decimal, now: datetime) -> Reservation:
        """Reserve the most that a request can use.

        Raises:  QuotaExceeded: the request would pass a limit; `retry_after_s` says when the window ends.  Overloaded:
        too many tenants at once.
        """
        limits = self.limits_of(tenant)
        with self._mutex:
            if len(self._tenants) >= _NUM_TENANTS_MAX:
                self._forget_idle(now)
            state = self._tenants.setdefault(tenant, _Tenant())
            if limits.requests is not None and state.num_running >= limits.requests:
                raise limit_error(LimitPassed.RUNNING, limits, None, now)
            for limit in limits.limits:
                usage = self._usage(tenant, limit.window, now)
                used = usage.tokens + usage.reserved_tokens
                if limit.tokens is not None and used + tokens > limit.tokens:
                    raise limit_error(LimitPassed.TOKENS, limits, limit, now, used=used, needs=tokens)
                if limit.money is not None and usage.money + usage.reserved_money + money > limit.money:
                    raise limit_error(LimitPassed.MONEY, limits, limit, now)
                if limit.requests is not None and usage.requests >= limit.requests:
                    raise limit_error(LimitPassed.REQUESTS, limits, limit, now)
            for window in _windows_of(limits):
                usage = self._usage(tenant, window, now)
                usage.reserved_tokens += tokens
                usage.reserved_money += money
                usage.requests += 1
            state.num_running += 1
        return Reservation(tenant=tenant, tokens=tokens, money=money, moment=now, windows=_windows_of(limits))

    def check(self, tenant: str, *, tokens: int = 1, now: datetime) -> None:
        """Check early whether a request of at least this many tokens could be admitted, before any work is done for it.

        Raises:  QuotaExceeded: a window has fewer tokens left than that, or no money at all.
        """
        with self._mutex:
            state = self._tenants.get(tenant, _Tenant())
            for limit in self.limits_of(tenant).limits:
                start = limit.window.start(now)
                usage = state.windows.get(limit.window)
                counts = usage if usage is not None and usage.start >= start else WindowUse(start=start)
                left_s = (limit.window.end(now) - now).total_seconds()
                used = counts.tokens + counts.reserved_tokens
                if limit.tokens is not None and used + tokens > limit.tokens:
                    raise RateLimited(
                        f"rate limit: {limit.tokens} tokens per {limit.window}, of which {used} are used or"
                        f" reserved, and this request needs {tokens} at least",
                        retry_after_s=left_s,
                    )
                if limit.money is not None and counts.money + counts.reserved_money > limit.money:
                    raise BudgetExceeded(
                        f"budget: {limit.money} per {limit.window} is used up or reserved", retry_after_s=left_s
                    )
                if limit.requests is not None and counts.requests >= limit.requests:
                    raise limit_error(LimitPassed.REQUESTS, self.limits_of(tenant), limit, now)

    def settle(self, reservation: Reservation, *, tokens: int, money: Decimal, is_counted: bool = True) -> None:
        """Replace the reservation by what was used. The use is counted in the window in which the request was admitted.

        is_counted: whether the request counts against limits on the number of requests.
        """
        with self._mutex:
            state = self._tenants[reservation.tenant]
            state.num_running -= 1
            for window, usage in state.windows.items():
                # The limit is newer than the request's admission, so this window holds no reservation for it.
                if usage.start == window.start(reservation.moment) and window in reservation.windows:
                    usage.tokens += tokens
                    usage.money += money
                    usage.reserved_tokens -= reservation.tokens
                    usage.reserved_money -= reservation.money
                    usage.requests -= not is_counted
            if not state.num_running and not self.limits_of(reservation.tenant).limits:
                del self._tenants[reservation.tenant]  # tenant names come from callers: keep only those that count

    def release(self, reservation: Reservation) -> None:
        """Give the whole reservation back: the request used nothing."""
        self.settle(reservation, tokens=0, money=Decimal(0), is_counted=False)

    def used(self, tenant: str, window: LimitWindow, now: datetime) -> tuple[int, Decimal]:
        """Tokens and money that are used or reserved in the current window."""
        with self._mutex:
            usage = self._usage(tenant, window, now)
            return usage.tokens + usage.reserved_tokens, usage.money + usage.reserved_money

    def counts(self, tenant: str, now: datetime) -> tuple[int, dict[LimitWindow, WindowUse]]:
        """How many requests of a tenant run, and how much is counted in each window for which it has a limit."""
        with self._mutex:
            windows = _windows_of(self.limits_of(tenant))
            state = self._tenants.get(tenant, _Tenant())
            return state.num_running, {window: replace(self._usage(tenant, window, now)) for window in windows}

    def counted_tenants(self) -> set[str]:
        with self._mutex:
            return set(self._tenants)

    def running_tenants(self) -> set[str]:
        with self._mutex:
            return {name for name, state in self._tenants.items() if state.num_running}

    def state(
        self,
        tenant: str,
        what: LimitPassed,
        now: datetime,
        others: Mapping[tuple[LimitWindow, LimitPassed], int] | None = None,
    ) -> LimitState | None:
        """The limit on tokens or requests with the least left; None if there is no such limit.

        others: what other routers have counted in the current windows.
        """
        limits = self.limits_of(tenant).limits
        _, windows = self.counts(tenant, now)
        found = []
        for limit in limits:
            most = limit.tokens if what is LimitPassed.TOKENS else limit.requests
            if most is not None:
                counts = windows[limit.window]
                used = counts.tokens + counts.reserved_tokens if what is LimitPassed.TOKENS else counts.requests
                used += (others or {}).get((limit.window, what), 0)
                reset_s = (limit.window.end(now) - now).total_seconds()
                found.append(LimitState(limit=most, remaining=max(0, most - used), reset_s=reset_s))
        return min(found, key=lambda each: each.remaining, default=None)

    def replace(
        self,
        tenants: Mapping[str, TenantLimits],
        default: TenantLimits,
        records: Iterable[UsageRecord],
        now: datetime,
    ) -> None:
        """Replace all limits. Existing counts stay. A window that had no limit before is counted from the records."""
        with self._mutex:
            before, self._limits, self._default = (self._limits, self._default), dict(tenants), default
        self._count_new_windows(before, records, now)

    def _count_new_windows(
        self, before: tuple[dict[str, TenantLimits], TenantLimits], records: Iterable[UsageRecord], now: datetime
    ) -> None:
        old_limits, old_default = before
        with self._mutex:
            for record in records:
                old = _windows_of(old_limits.get(record.tenant, old_default))
                moment = moment_of(record.started_us)
                for window in _windows_of(self.limits_of(record.tenant)) - old:
                    if window.start(moment) == window.start(now):
                        usage = self._usage(record.tenant, window, now)
                        usage.tokens += record.prompt_tokens + record.output_tokens
                        usage.money += record.price
                        usage.requests += 1

    def _forget_idle(self, now: datetime) -> None:
        """Drop the tenants for which nothing is counted. Tenant names come from callers, so there may be any number of
        them.
        """
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

    def _usage(self, tenant: str, window: LimitWindow, now: datetime) -> WindowUse:
        windows = self._tenants.setdefault(tenant, _Tenant()).windows
        start = window.start(now)
        usage = windows.get(window)
        if usage is None or usage.start < start:
            usage = windows[window] = WindowUse(start=start)
        return usage
