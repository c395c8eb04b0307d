"""One record for each admitted request, whatever ends it; with scripted workers and a real ledger."""

import asyncio
import contextlib
import dataclasses
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from antefix.block import as_tokens
from antefix.errors import Conflict, InvalidRequest, Overloaded, QuotaExceeded, Unavailable
from antefix.usage.ledger_files import read_settled
from antefix.usage.quota import Limit, TenantLimits, Window
from antefix.usage.ratecard import load_cards
from antefix.usage.record import Status
from antefix.usage.tenants import TenantBook, load_tenants
from antefix.wire import Sampling
from tests.gateway.scripted import Script, make_front
from tests.usage.test_ratecard import DEPLOY

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


async def ask(front, request_id="", *, tokens=PROMPT, sampling=SAMPLING, tenant="acme"):
    bill = await front.admit(tokens, sampling, tenant=tenant, request_id=request_id)
    outputs = [int(token) async for piece in front.run(bill, 10.0) for token in piece]
    return bill, outputs


async def test_a_request_is_open_before_its_first_token_and_settled_at_its_end(tmp_path, open_front):
    front = open_front(Script(hit=64), cards=load_cards([DEPLOY / "example.toml"]))
    bill = await front.admit(PROMPT, SAMPLING, tenant="acme", request_id="r")
    outputs = front.run(bill, 10.0)
    await anext(outputs)
    assert [entry.request_id for entry in front.accounts.ledger.unsettled()] == ["r"]
    assert [token async for token in outputs] and front.accounts.ledger.unsettled() == []
    (record,) = records(tmp_path)
    assert (record.prompt_tokens, record.cache_hit_tokens, record.output_tokens) == (100, 64, 3)
    assert record.price == Decimal("0.01") * 64 / 10**6 + Decimal("0.10") * 36 / 10**6 + Decimal("0.40") * 3 / 10**6
    assert record == bill.record


async def test_requests_that_a_crash_cut_off_are_closed_uncharged_and_may_be_tried_again(tmp_path, open_front):
    front = open_front(Script())
    bill = await front.admit(PROMPT, SAMPLING, tenant="acme", request_id="r")
    await anext(front.run(bill, 10.0))
    front.accounts.ledger.close()  # as kill -9 leaves it: open, never settled
    again = open_front(Script())
    (crashed,) = records(tmp_path)
    assert (crashed.status, crashed.price, crashed.prompt_tokens) == (Status.CRASHED, 0, 0)
    bill, _ = await ask(again, "r")
    assert (bill.record.status, bill.record.attempt) == (Status.STOP, 2)


async def test_a_failed_request_costs_nothing_and_may_be_tried_again(tmp_path, open_front):
    script = Script(error=Unavailable("gone"), fail_after=1)
    front = open_front(script, cards=load_cards([DEPLOY / "example.toml"]))
    with pytest.raises(Unavailable):
        await ask(front, "r")
    script.error = None
    await ask(front, "r")
    assert [(r.status, r.attempt, r.output_tokens, r.price > 0) for r in records(tmp_path)] == [
        (Status.FAILED, 1, 1, False),
        (Status.STOP, 2, 3, True),
    ]


async def test_a_cancelled_request_is_billed_for_what_was_done_and_its_id_is_used_up(tmp_path, open_front):
    front = open_front(Script(say=lambda prompt: "abcdef"), cards=load_cards([DEPLOY / "example.toml"]))
    bill = await front.admit(PROMPT, SAMPLING, tenant="acme", request_id="r")
    outputs = front.run(bill, 10.0)
    await anext(outputs)
    await outputs.aclose()
    await front.accounts.close()
    (record,) = records(tmp_path)
    assert (record.status, record.output_tokens, record.prompt_tokens) == (Status.CANCELLED, 1, 100)
    assert record.price > 0
    again = open_front(Script())
    with pytest.raises(Conflict, match="cancelled"):
        await again.admit(PROMPT, SAMPLING, tenant="acme", request_id="r")


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
    # The seed that the router draws depends on the id alone, so that a repeat samples the same tokens.
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
    tenants = TenantBook(limits={"acme": TenantLimits(limits=(Limit(window=Window.MONTH, tokens=230),))})
    front = open_front(Script(), tenants=tenants)
    await ask(front)
    await front.accounts.close()
    again = open_front(Script(), tenants=tenants)
    await ask(again)
    with pytest.raises(QuotaExceeded) as caught:
        await ask(again)
    assert 0 < caught.value.retry_after_s <= 31 * 86400
    assert again.accounts._quotas.used("acme", Window.MONTH, datetime.now(UTC))[0] == 206


async def test_budgets_hold_for_requests_at_once(open_front):
    tenants = TenantBook(limits={"acme": TenantLimits(limits=(Limit(window=Window.MONTH, tokens=500),))})
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
