"""Each admitted request has one record, whatever ends it. Workers are scripted, and the ledger is real."""

import asyncio
import contextlib
import dataclasses
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from antefix.block import as_tokens
from antefix.errors import InvalidRequest, Overloaded, QuotaExceeded, Unavailable
from antefix.generation_request import Caller, GenerationRequest
from antefix.miss_reason import MissReason
from antefix.sampling import Sampling
from antefix_billing.ledger_files import read_settled
from antefix_billing.limits import Limit, LimitWindow, TenantLimits
from antefix_billing.pricing import priced
from antefix_billing.ratecard import load_cards
from antefix_billing.tenants import TenantBook, load_tenants
from antefix_billing.usage_record import Status
from tests.billing.test_ratecard import DEPLOY
from tests.gateway.scripted import Script, make_front
from tests.waiting import until

CARDS = load_cards([DEPLOY / "example.toml"])
PROMPT = as_tokens(list(range(100)))
SAMPLING = Sampling(max_tokens=20)


@pytest.fixture
async def open_front(tmp_path):
    fronts = []

    def open_front(script, **settings):
        fronts.append(make_front(script, ledger=tmp_path / "ledger", **settings))
        return fronts[-1]

    yield open_front
    for front in fronts:
        with contextlib.suppress(RuntimeError):
            await front.accounts.close()


def records(tmp_path):
    return [item.record for item in read_settled(tmp_path / "ledger")]


def request_of(request_id="r", *, tokens=PROMPT, sampling=SAMPLING, tenant="acme", num_samples=1):
    caller = Caller(tenant=tenant, request_id=request_id)
    return GenerationRequest(tokens=tokens, sampling=sampling, caller=caller, num_samples=num_samples)


async def ask(front, request_id="", **settings):
    bill = await front.admit(request_of(request_id, **settings))
    outputs = [int(token) async for piece in front.run(bill, 10.0) for token in piece.tokens]
    return bill, outputs


async def test_a_request_is_open_before_its_first_token_and_settled_at_its_end(tmp_path, open_front):
    front = open_front(Script(hit=64), cards=load_cards([DEPLOY / "example.toml"]))
    bill = await front.admit(request_of())
    outputs = front.run(bill, 10.0)
    await anext(outputs)
    assert [entry.request_id for entry in front.accounts.ledger.unsettled()] == ["r"]
    assert [token async for token in outputs] and front.accounts.ledger.unsettled() == []
    (record,) = records(tmp_path)
    assert (record.prompt_tokens, record.cache_hit_tokens, record.output_tokens) == (100, 64, 3)
    assert record.price == Decimal("0.01") * 64 / 10**6 + Decimal("0.10") * 36 / 10**6 + Decimal("0.40") * 3 / 10**6
    assert record == bill.record


def price_of(hit, miss, output):
    """The price according to deploy/ratecards/example.toml."""
    return (Decimal("0.01") * hit + Decimal("0.10") * miss + Decimal("0.40") * output) / 10**6


async def _read(outputs, num_tokens):
    for _ in range(num_tokens):
        await anext(outputs)


async def crash_after(open_front, num_tokens, *, held=False, **settings):
    """The router ends in mid-request, when the client has `num_tokens` tokens. Then the router starts again."""
    hold = None if num_tokens else asyncio.Event()
    front = open_front(Script(hit=64, hold=hold), cards=CARDS, **settings)
    bill = await front.admit(request_of())
    bill.is_held = held
    outputs = front.run(bill, 10.0)
    reading = asyncio.create_task(_read(outputs, max(1, num_tokens)))
    await until(reading.done if num_tokens else front.accounts.ledger.unsettled)
    front.accounts.ledger.close()  # as after kill -9: the request is open and was never settled
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    return open_front(Script(hit=64), cards=CARDS, **settings)


async def test_a_request_that_a_crash_cut_off_costs_what_its_client_was_given(tmp_path, open_front):
    await crash_after(open_front, 2)
    (crashed,) = records(tmp_path)
    assert crashed.status is Status.CRASHED and crashed.miss_reason is MissReason.NONE
    assert (crashed.prompt_tokens, crashed.cache_hit_tokens, crashed.output_tokens) == (100, 64, 2)
    assert (crashed.hit_store_tokens, crashed.restore_plan, crashed.last_hit_hash) == (64, "checkpoint", "ab" * 32)
    assert crashed.price == price_of(64, 36, 2)


async def test_a_retry_after_a_crash_pays_only_the_rest(tmp_path, open_front):
    again = await crash_after(open_front, 2)
    bill, outputs = await ask(again, "r")
    crashed, whole = records(tmp_path)
    assert (whole.status, whole.attempt, whole.output_tokens, len(outputs)) == (Status.STOP, 2, 3, 3)
    assert whole.paid_before == crashed.price and whole.paid == price_of(64, 36, 3) == crashed.price + whole.price
    with_cards = priced(whole, CARDS)
    assert (with_cards.price, bill.usage().output_tokens) == (whole.price, 3)


@pytest.mark.parametrize(("num_tokens", "held"), [(0, False), (3, True)])
async def test_a_crash_before_the_client_had_anything_costs_nothing(tmp_path, open_front, num_tokens, held):
    again = await crash_after(open_front, num_tokens, held=held)
    await ask(again, "r")
    crashed, whole = records(tmp_path)
    assert (crashed.status, crashed.price, crashed.output_tokens) == (Status.CRASHED, 0, 0)
    assert (whole.attempt, whole.paid_before, whole.price) == (2, 0, price_of(64, 36, 3))


async def test_crash_after_crash_never_costs_more_than_the_dearest_attempt(tmp_path, open_front):
    for num_tokens in (1, 3, 2):
        (await crash_after(open_front, num_tokens)).accounts.ledger.close()
    prices = [record.price for record in records(tmp_path)]
    assert prices == [price_of(64, 36, 1), price_of(0, 0, 2), 0]
    again = open_front(Script(hit=64), cards=CARDS)
    await ask(again, "r")
    assert sum(record.price for record in records(tmp_path)) == price_of(64, 36, 3)


async def test_what_a_crash_was_charged_counts_against_the_quota(tmp_path, open_front):
    tenants = TenantBook(limits={"acme": TenantLimits(limits=(Limit(window=LimitWindow.MONTH, tokens=10_000),))})
    again = await crash_after(open_front, 2, tenants=tenants)
    assert again.accounts.quotas.used("acme", LimitWindow.MONTH, datetime.now(UTC)) == (102, price_of(64, 36, 2))


@pytest.mark.parametrize(("fail_after", "held"), [(2, False), (0, False), (2, True)])
async def test_a_failed_request_costs_what_its_client_was_given(tmp_path, open_front, fail_after, held):
    script = Script(error=Unavailable("gone"), fail_after=fail_after)
    front = open_front(script, cards=CARDS)
    bill = await front.admit(request_of())
    bill.is_held = held
    with pytest.raises(Unavailable):
        [piece async for piece in front.run(bill, 10.0)]
    script.error = None
    await ask(front, "r")
    failed, whole = records(tmp_path)
    num_given = 0 if held else fail_after
    assert (failed.status, failed.attempt, failed.output_tokens) == (Status.FAILED, 1, num_given)
    assert failed.price == (price_of(0, 100, num_given) if num_given else 0)
    assert (whole.status, whole.attempt, failed.price + whole.price) == (Status.STOP, 2, price_of(0, 100, 3))


@pytest.mark.parametrize("held", [False, True])
async def test_a_cancelled_request_costs_what_was_given_and_its_retry_pays_the_rest(tmp_path, open_front, held):
    front = open_front(Script(say=lambda prompt: "abcdef"), cards=CARDS)
    bill = await front.admit(request_of())
    bill.is_held = held
    outputs = front.run(bill, 10.0)
    await _read(outputs, 2)
    await outputs.aclose()
    await front.accounts.close()
    (cancelled,) = records(tmp_path)
    num_given = 0 if held else 2
    assert (cancelled.status, cancelled.output_tokens, cancelled.prompt_tokens) == (Status.CANCELLED, num_given, 100)
    assert cancelled.price == price_of(0, 100, num_given)
    again = open_front(Script(say=lambda prompt: "abcdef"), cards=CARDS)
    await ask(again, "r")
    _, whole = records(tmp_path)
    assert (whole.status, whole.attempt, whole.output_tokens) == (Status.STOP, 2, 6)
    assert cancelled.price + whole.price == price_of(0, 100, 6)


async def test_a_repeat_gives_the_same_answer_is_not_charged_and_is_bounded(tmp_path, open_front):
    script = Script()
    front = open_front(script)
    sampling = Sampling(max_tokens=5, temperature=1.0)
    first, _ = await ask(front, "r", sampling=sampling)
    for _ in range(3):
        again, _ = await ask(front, "r", sampling=sampling)
        assert again.record == first.record
    with pytest.raises(Overloaded):
        await ask(front, "r", sampling=sampling)
    assert len(records(tmp_path)) == 1
    # The router's seed depends only on the request's id, so that a repeat samples the same tokens.
    assert len({request.sampling.seed for request in script.requests}) == 1
    assert script.requests[0].sampling.seed is not None
    await ask(front, "other", sampling=sampling)
    assert script.requests[-1].sampling.seed != script.requests[0].sampling.seed


async def test_an_id_cannot_be_used_for_another_request(open_front):
    front = open_front(Script())
    await ask(front, "r")
    with pytest.raises(InvalidRequest, match="another request"):
        await ask(front, "r", tokens=as_tokens([1, 2, 3]))
    with pytest.raises(InvalidRequest, match="another request"):
        await ask(front, "r", sampling=dataclasses.replace(SAMPLING, max_tokens=21))
    await ask(front, "r", tokens=as_tokens([1, 2, 3]), tenant="somebody else")


async def test_what_could_not_be_stored_is_in_the_record_and_in_the_counters(tmp_path, open_front):
    front = open_front(Script(hit=64))
    await ask(front, "stored")
    bill = await front.admit(request_of())
    bill.generation.write_error = "InvalidRequest: a name is too long" + "x" * 500
    [piece async for piece in front.run(bill, 10.0)]
    stored, unstored = records(tmp_path)
    assert not stored.write_error and b"write_error" not in stored.to_payload()
    assert unstored.write_error.startswith("InvalidRequest: a name is too long") and len(unstored.write_error) == 200
    assert (front.accounts.num_unstored, front.accounts.unstored_reason) == (1, unstored.write_error)


async def test_no_bill_no_answer(tmp_path, open_front, monkeypatch):
    front = open_front(Script())

    def refuse(items):
        raise Unavailable("the ledger cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(front.accounts.ledger, "append", refuse)
        with pytest.raises(Unavailable, match="ledger"):
            await ask(front, "r")
    assert records(tmp_path) == []
    await ask(front, "r")
    assert len(records(tmp_path)) == 1


async def test_quotas_hold_across_a_restart(tmp_path, open_front):
    tenants = TenantBook(limits={"acme": TenantLimits(limits=(Limit(window=LimitWindow.MONTH, tokens=230),))})
    front = open_front(Script(), tenants=tenants)
    await ask(front)
    await front.accounts.close()
    again = open_front(Script(), tenants=tenants)
    await ask(again)
    with pytest.raises(QuotaExceeded) as caught:
        await ask(again)
    assert 0 < caught.value.retry_after_s <= 31 * 86400
    assert again.accounts.quotas.used("acme", LimitWindow.MONTH, datetime.now(UTC))[0] == 206


async def test_budgets_hold_for_requests_at_once(open_front):
    tenants = TenantBook(limits={"acme": TenantLimits(limits=(Limit(window=LimitWindow.MONTH, tokens=500),))})
    front = open_front(Script(pause_s=0.01), tenants=tenants)
    results = await asyncio.gather(*(ask(front) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(result, QuotaExceeded) for result in results) == 6


async def test_without_a_ledger_requests_are_counted_and_nothing_is_kept(tmp_path):
    front = make_front(Script(hit=64), ledger=None)
    bill, _ = await ask(front, "r")
    assert (bill.usage().cache_hit_tokens, bill.usage().output_tokens) == (64, 3)
    assert list(tmp_path.iterdir()) == []


def test_tenants_files_are_read_strictly(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(
        f"""
[[tenant]]
name = "acme"
api_key_sha256 = ["{"ab" * 32}"]
requests = 2
limit = [{{ window = "day", tokens = 1000, money = "0.5" }}]
"""
    )
    book = load_tenants(path)
    assert book.limits["acme"].limits[0].money == Decimal("0.5")
    for wrong in ('window = "week"', 'window = "day", tokens = 1, monney = "1"', 'window = "day", money = 0.5'):
        path.write_text(f'[[tenant]]\nname = "a"\nlimit = [{{ {wrong} }}]\n')
        with pytest.raises(InvalidRequest):
            load_tenants(path)


async def test_a_request_that_fails_before_anybody_worked_on_it_says_how_long_its_prompt_was(tmp_path, open_front):
    class Failing(Script):
        async def run(self, generation, timeout_s):
            raise Unavailable("no prefill worker answers")
            yield

    front = open_front(Failing(), cards=CARDS)
    bill = await front.admit(request_of())
    with pytest.raises(Unavailable):
        async for _ in front.run(bill, 10.0):
            pass
    (record,) = records(tmp_path)
    assert (record.status, record.prompt_tokens, record.cache_hit_tokens) == (Status.FAILED, 100, 0)
    assert record.cache_miss_tokens == 100 and record.price == 0


async def test_a_request_that_a_crash_cut_off_in_its_prefill_says_it_too(tmp_path, open_front):
    await crash_after(open_front, 0)
    (record,) = records(tmp_path)
    assert (record.status, record.prompt_tokens, record.cache_miss_tokens) == (Status.CRASHED, 100, 100)
    assert record.output_tokens == 0 and record.price == 0
