import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from antefix.errors import Overloaded, QuotaExceeded
from antefix_billing import limits as quota
from antefix_billing.limits import Limit, LimitWindow, QuotaBook, TenantLimits
from tests.billing.usage_records import NOW_US, record

NOW = datetime(2026, 9, 22, 12, 30, 15, tzinfo=UTC)


def book(**limits):
    return QuotaBook({"acme": TenantLimits(limits=(Limit(**limits),))})


def test_a_request_that_may_pass_the_limit_is_refused_with_the_time_to_wait():
    quotas = book(window=LimitWindow.DAY, tokens=1000)
    quotas.reserve("acme", tokens=900, money=Decimal(0), now=NOW)
    with pytest.raises(QuotaExceeded) as caught:
        quotas.reserve("acme", tokens=200, money=Decimal(0), now=NOW)
    assert caught.value.retry_after_s == (11 * 60 + 29) * 60 + 45


def test_what_was_not_used_is_given_back():
    quotas = book(window=LimitWindow.DAY, tokens=1000)
    reservation = quotas.reserve("acme", tokens=900, money=Decimal(0), now=NOW)
    quotas.settle(reservation, tokens=100, money=Decimal(0))
    quotas.reserve("acme", tokens=900, money=Decimal(0), now=NOW)
    assert quotas.used("acme", LimitWindow.DAY, NOW) == (1000, 0)


def test_money_has_its_own_limit():
    quotas = book(window=LimitWindow.MONTH, money=Decimal("0.10"))
    quotas.reserve("acme", tokens=10**9, money=Decimal("0.09"), now=NOW)
    with pytest.raises(QuotaExceeded, match="budget"):
        quotas.reserve("acme", tokens=1, money=Decimal("0.02"), now=NOW)


@pytest.mark.parametrize(
    ("window", "later"),
    [
        (LimitWindow.MINUTE, timedelta(seconds=50)),
        (LimitWindow.DAY, timedelta(hours=12)),
        (LimitWindow.MONTH, timedelta(days=9)),
    ],
)
def test_a_new_window_starts_at_zero(window, later):
    quotas = book(window=window, tokens=100)
    old = quotas.reserve("acme", tokens=100, money=Decimal(0), now=NOW)
    quotas.reserve("acme", tokens=100, money=Decimal(0), now=NOW + later)
    quotas.settle(old, tokens=0, money=Decimal(0))  # counts in its own window, not in this one
    assert quotas.used("acme", window, NOW + later)[0] == 100


def test_requests_at_a_time_are_limited_and_tenants_do_not_share():
    quotas = QuotaBook({}, default=TenantLimits(requests=1))
    held = quotas.reserve("a", tokens=1, money=Decimal(0), now=NOW)
    quotas.reserve("b", tokens=1, money=Decimal(0), now=NOW)
    with pytest.raises(QuotaExceeded):
        quotas.reserve("a", tokens=1, money=Decimal(0), now=NOW)
    quotas.release(held)
    quotas.reserve("a", tokens=1, money=Decimal(0), now=NOW)


def test_a_refused_request_reserves_nothing():
    quotas = QuotaBook(
        {
            "acme": TenantLimits(
                limits=(Limit(window=LimitWindow.DAY, tokens=1000), Limit(window=LimitWindow.MONTH, tokens=500))
            )
        }
    )
    with pytest.raises(QuotaExceeded):
        quotas.reserve("acme", tokens=600, money=Decimal(0), now=NOW)
    assert quotas.used("acme", LimitWindow.DAY, NOW)[0] == 0


def test_counts_come_back_from_the_ledger():
    now = datetime.fromtimestamp(NOW_US // 1_000_000, tz=UTC)
    quotas = book(window=LimitWindow.DAY, tokens=500)
    records = [record("a"), record("b"), record("old", started_us=NOW_US - 90_000_000_000)]
    quotas.restore(records, now)
    assert quotas.used("acme", LimitWindow.DAY, now) == (420, Decimal("0.000002"))
    with pytest.raises(QuotaExceeded):
        quotas.reserve("acme", tokens=100, money=Decimal(0), now=now)


def test_limits_hold_under_concurrency():
    quotas = book(window=LimitWindow.DAY, tokens=10_000, money=Decimal("1"))
    peak, admitted, errors = [0], [0], []
    mutex = threading.Lock()

    def work():
        for _ in range(300):
            try:
                held = quotas.reserve("acme", tokens=97, money=Decimal("0.001"), now=NOW)
            except QuotaExceeded:
                continue
            with mutex:
                admitted[0] += 1
                peak[0] = max(peak[0], quotas.used("acme", LimitWindow.DAY, NOW)[0])
            quotas.settle(held, tokens=31, money=Decimal("0.0005"))
        errors.append(None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 8
    assert peak[0] <= 10_000
    assert quotas.used("acme", LimitWindow.DAY, NOW) == (31 * admitted[0], Decimal("0.0005") * admitted[0])
    assert 10_000 - 97 < 31 * admitted[0] <= 10_000


def test_names_that_count_nothing_any_more_are_forgotten(monkeypatch):
    monkeypatch.setattr(quota, "_NUM_TENANTS_MAX", 10)
    quotas = QuotaBook({}, default=TenantLimits(limits=(Limit(window=LimitWindow.MINUTE, tokens=100),)))
    for number in range(10):
        quotas.settle(quotas.reserve(f"t{number}", tokens=5, money=Decimal(0), now=NOW), tokens=5, money=Decimal(0))
    with pytest.raises(Overloaded):
        quotas.reserve("one more", tokens=5, money=Decimal(0), now=NOW)
    quotas.reserve("one more", tokens=5, money=Decimal(0), now=NOW + timedelta(minutes=1))
    assert list(quotas._tenants) == ["one more"]
