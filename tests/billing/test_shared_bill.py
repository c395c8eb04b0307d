"""Several routers share one bill: ids, limits and receipts in a real Redis, which may die and lose all its data."""

import asyncio
import contextlib
from dataclasses import dataclass
from decimal import Decimal

import pytest

from antefix.errors import Conflict, Overloaded, QuotaExceeded, Unavailable
from antefix.secret import Keyring
from antefix_billing.adjustment import Adjusted
from antefix_billing.ledger_files import read_billed
from antefix_billing.limits import Limit, LimitWindow, TenantLimits
from antefix_billing.ratecard import load_cards
from antefix_billing.tenants import TenantBook
from antefix_billing.usage_record import Status
from antefix_router.front import share_bill
from tests.billing.test_accounting import request_of
from tests.billing.test_ratecard import DEPLOY
from tests.gateway.scripted import Script, make_front
from tests.waiting import until

CARDS = load_cards([DEPLOY / "example.toml"])
KEYRING = Keyring(b"0" * 16)
pytestmark = pytest.mark.services


@dataclass
class Settings:
    bill_redis: str
    bill_keep_s: float = 3600.0
    bill_alone: str = "refuse"
    redis_password_file: str = ""
    redis_ca_file: str = ""


@pytest.fixture
async def routers(tmp_path):
    """Makes routers that share a Redis; all are closed at the end."""
    made = []

    async def start(name, redis, script=None, *, alone="refuse", **settings):
        front = make_front(script or Script(hit=64), ledger=tmp_path / name, cards=CARDS, **settings)
        front.accounts.shared = share_bill(Settings(redis.url, bill_alone=alone), front.accounts, KEYRING)
        front.start()
        made.append(front)
        await until(lambda: not front.accounts.shared.is_out)
        return front

    yield start
    for front in made:
        with contextlib.suppress(RuntimeError, Unavailable):
            await front.accounts.close()


async def ask(front, request_id="r", **settings):
    bill = await front.admit(request_of(request_id, **settings))
    tokens = [int(token) async for piece in front.run(bill, 10.0) for token in piece.tokens]
    return bill, tokens


def billed(tmp_path, *names):
    """(number of charged requests, total money after adjustments) of these ledgers."""
    items = [item for name in names for item in read_billed(tmp_path / name)]
    money = sum(
        (item.adjustment.amount if isinstance(item, Adjusted) else item.record.price for item in items), Decimal(0)
    )
    return sum(not isinstance(item, Adjusted) for item in items), money


async def test_the_same_id_at_two_routers_is_charged_once_and_any_gives_its_receipt(tmp_path, redis, routers):
    one, two = await routers("one", redis), await routers("two", redis)
    first, tokens = await ask(one)
    again, same = await ask(two)
    assert same == tokens and again.record == first.record
    assert billed(tmp_path, "one", "two") == (1, first.record.price) and first.record.price > 0
    found, source = await two.accounts.find("acme:r")
    assert (found.record, source) == (first.record, one.accounts.ledger.source)


async def test_a_request_that_runs_at_one_router_is_a_conflict_at_another(redis, routers):
    hold = asyncio.Event()
    one, two = await routers("one", redis, Script(hit=64, hold=hold)), await routers("two", redis)
    running = asyncio.create_task(ask(one))
    await until(lambda: one.accounts.shared.counters.claimed)
    with pytest.raises(Conflict, match="another router"):
        await ask(two)
    hold.set()
    await running
    assert (await ask(two))[1]


async def test_what_one_router_cut_off_another_goes_on_with_and_charges_the_rest(tmp_path, redis, routers):
    one, two = await routers("one", redis, Script(hit=64, pause_s=0.01)), await routers("two", redis)
    bill = await one.admit(request_of())
    outputs = one.run(bill, 10.0)
    await anext(outputs)
    await outputs.aclose()
    await until(lambda: one.accounts.num_running == 0)
    again, tokens = await ask(two)
    assert (again.record.attempt, len(tokens)) == (2, 3)
    assert again.record.paid_before == bill.record.price > 0
    assert billed(tmp_path, "one", "two") == (2, again.record.paid)


async def test_a_router_that_died_is_taken_over_and_what_both_charged_goes_back(tmp_path, redis, routers):
    one, two = await routers("one", redis, Script(hit=64, pause_s=0.05)), await routers("two", redis)
    bill = await one.admit(request_of())
    outputs = one.run(bill, 10.0)
    await anext(outputs)
    # As after kill -9: the router sends no heartbeat and settles nothing.
    one.accounts.shared._task.cancel()
    one.accounts.ledger.close()
    redis.ask(f"DEL antefix:bill:router:{one.accounts.writer.source_name}")
    await until(lambda: one.accounts.shared.me not in two.accounts.shared._alive)
    whole, _ = await ask(two)
    back = await routers("one", redis)
    await until(lambda: not back.accounts.shared.num_untold and back.accounts.shared.counters.told)
    (crashed,) = [i.record for i in read_billed(tmp_path / "one") if not isinstance(i, Adjusted)]
    assert crashed.status is Status.CRASHED and crashed.price > 0
    assert billed(tmp_path, "one", "two") == (2, whole.record.price)


async def test_a_redis_that_lost_all_is_told_again_before_a_named_request_runs(tmp_path, start_redis, routers):
    redis = await asyncio.to_thread(start_redis)
    one, two = await routers("one", redis), await routers("two", redis)
    first, _ = await ask(one)
    redis.kill()
    with pytest.raises(Unavailable, match="Redis"):
        await ask(two)
    # A request without a client's idempotency key cannot also run at another router.
    await ask(two, "")
    await asyncio.to_thread(redis.start)
    await until(lambda: not one.accounts.shared.is_out and not two.accounts.shared.is_out)
    again, _ = await until(lambda: ask(two), "the router takes requests", despite=Unavailable)
    assert again.record == first.record


async def test_what_is_told_again_goes_on_after_a_failure(start_redis, routers, monkeypatch):
    """The router continues where it failed. If it began again each time, a busy Redis would never get all requests."""
    redis = await asyncio.to_thread(start_redis)
    one = await routers("one", redis)
    for number in range(8):
        await ask(one, f"r{number}")
    shared = one.accounts.shared
    change, told = shared._exchange.change, []

    async def fails_now_and_then(key, made):
        told.append(key)
        if len(told) % 4 == 3:
            raise Unavailable("Redis is busy")
        return await change(key, made)

    redis.kill()
    monkeypatch.setattr(shared._exchange, "change", fails_now_and_then)
    monkeypatch.setattr("antefix_router.shared_bill.shared_bill._TOLD_AT_ONCE", 1)
    await asyncio.to_thread(redis.start)
    await until(lambda: len(set(told)) == 8 and not shared.num_untold)
    assert len(told) <= 12
    assert (await ask(one, "r0"))[0].record.request_id == "r0"


async def test_served_alone_while_redis_is_out_two_charges_become_one(tmp_path, start_redis, routers):
    redis = await asyncio.to_thread(start_redis)
    one, two = await routers("one", redis, alone="serve"), await routers("two", redis, alone="serve")
    redis.kill()
    first, _ = await ask(one)
    await ask(two)
    await asyncio.to_thread(redis.start)
    await until(lambda: sum(f.accounts.shared.counters.credited for f in (one, two)) == 1)
    assert billed(tmp_path, "one", "two") == (2, first.record.price)


@pytest.mark.parametrize(
    "limit",
    [{"tokens": 300}, {"requests": 2}, {"money": Decimal("0.00003")}],
    ids=["tokens", "requests", "money"],
)
async def test_a_limit_holds_over_all_routers(redis, routers, limit):
    tenants = TenantBook(limits={"acme": TenantLimits(limits=(Limit(window=LimitWindow.MONTH, **limit),))})
    fronts = [await routers(name, redis, tenants=tenants) for name in ("one", "two", "three")]
    admitted = 0
    with pytest.raises(QuotaExceeded):
        for number in range(12):
            await ask(fronts[number % 3], f"r{number}")
            admitted += 1
    assert 1 <= admitted <= 6
    for front in fronts:
        with pytest.raises(QuotaExceeded):
            await ask(front, "one more")


async def test_requests_at_once_are_counted_over_all_routers_and_a_dead_one_holds_none(redis, routers):
    hold = asyncio.Event()
    tenants = TenantBook(limits={"acme": TenantLimits(requests=1)})
    one = await routers("one", redis, Script(hold=hold), tenants=tenants)
    two = await routers("two", redis, tenants=tenants)
    running = asyncio.create_task(ask(one))
    # The request's reservation is in Redis.
    await until(lambda: "acme" in one.accounts.shared.quotas._others)
    with pytest.raises((QuotaExceeded, Overloaded)):
        await ask(two, "other")
    hold.set()
    await running
    _, usage = await until(lambda: ask(two, "other"), "the quota has room", despite=(QuotaExceeded, Overloaded))
    assert usage


async def test_what_others_write_into_redis_is_not_believed(redis, routers):
    one, two = await routers("one", redis), await routers("two", redis)
    await ask(one)
    keys = [k for k in redis.ask("KEYS antefix:bill:request:*").split() if k.startswith("antefix")]
    redis.ask(f"SET {keys[0]} 00")
    with pytest.raises(Unavailable):
        await ask(two)
