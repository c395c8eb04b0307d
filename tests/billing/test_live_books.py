"""Tenants and rate cards change while a router runs. Records that are already priced do not change."""

import asyncio
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from antefix.errors import ConfigError, InvalidRequest, QuotaExceeded, Unauthenticated
from antefix_billing.adjustment import Adjusted, Adjustment, AdjustmentKind, Change
from antefix_billing.adjustment_inbox import adjust
from antefix_billing.api_keys import new_key
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_billed, read_entries, read_settled
from antefix_billing.ledger_format import EntryKind
from antefix_billing.ratecard import load_cards
from antefix_billing.reconcile import verify
from antefix_billing.rerate import rerated
from antefix_billing.tenants import load_tenants
from antefix_router.front import key_register
from antefix_router.live_books import LiveBooks
from tests.billing.test_accounting import ask, request_of
from tests.gateway.scripted import Script, make_front

KEY = "1" * 64


@dataclass
class Files:
    tenants_file: str
    ratecards: tuple[str, ...]
    api_keys_file: str = ""
    others: dict = field(default_factory=dict)


def tenants_text(*names, tokens=10**6):
    return "".join(
        f'[[tenant]]\nname = "{name}"\napi_key_sha256 = ["{str(number) * 64}"]\n'
        f'limit = [{{ window = "month", tokens = {tokens} }}]\n'
        for number, name in enumerate(names, 1)
    )


def card_text(version, effective, miss="1.00", extra=""):
    return (
        f'[[card]]\nversion = "{version}"\nmodels = ["antefix-tiny"]\ncurrency = "USD"\n'
        f'effective = {effective.isoformat()}\nprices = {{ hit = "0.10", miss = "{miss}", output = "2.00" }}\n{extra}\n'
    )


FIRST = card_text("first", datetime(2020, 1, 1, tzinfo=UTC))


@pytest.fixture
async def live(tmp_path):
    tenants, cards = tmp_path / "tenants.toml", tmp_path / "cards.toml"
    tenants.write_text(tenants_text("acme"))
    tenants.chmod(0o600)
    cards.write_text(FIRST)
    book = load_tenants(tenants)
    front = make_front(
        Script(hit=64), ledger=tmp_path / "ledger", cards=load_cards([cards]), tenants=book, keys=key_register(book)
    )
    books = LiveBooks(Files(str(tenants), (str(cards),)), front)
    yield front, books, tenants, cards
    await front.accounts.close()


def changes(tmp_path):
    entries = (entry for _, entry in read_entries(tmp_path / "ledger"))
    return [Change.from_payload(entry.payload) for entry in entries if entry.kind is EntryKind.CHANGE]


async def test_a_new_tenant_a_gone_key_and_another_limit_hold_from_the_next_look_on(tmp_path, live):
    front, books, tenants, _ = live
    assert front.keys.named == {bytes.fromhex(KEY): "acme"}
    await ask(front, "r")
    tenants.write_text(tenants_text("globex", "acme", tokens=150))
    await books.look()
    assert sorted(front.keys.named.values()) == ["acme", "globex"] and books.num_changes == 1
    with pytest.raises(QuotaExceeded):
        await front.admit(request_of("s"))
    with pytest.raises(Unauthenticated):
        front.keys.authenticate("unknown")
    assert [change.kind for change in changes(tmp_path)] == ["tenants", "rate_cards"]
    assert verify(tmp_path / "ledger").ok


async def test_api_keys_that_changed_stand_in_the_ledger(tmp_path, live):
    front, books, *_ = live
    _, key = new_key("acme")
    front.keys.take(front.keys.book.added(key))
    for _ in range(2):
        await books.look()
    (change,) = changes(tmp_path)
    said = json.loads(change.content)
    assert (change.kind, said["number"], said["keys"]) == ("api_keys", 1, 1) and key.digest.hex() not in change.content


async def test_a_fault_in_one_file_changes_nothing_of_the_other(live):
    front, books, tenants, cards = live
    before = front.accounts.cards
    tenants.write_text(tenants_text("globex"))
    cards.write_text("[[card]]\nversion = 1\n")
    await books.look()
    assert front.accounts.cards is before and "acme" in front.keys.named.values()
    assert (books.num_changes, books.num_refused) == (0, 1)
    cards.write_text(FIRST + card_text("second", datetime.now(UTC) + timedelta(days=1)))
    await books.look()
    assert list(front.keys.named.values()) == ["globex"] and books.num_changes == 1


async def test_a_card_from_before_priced_records_is_refused_and_one_from_now_on_is_not(live):
    front, books, _, cards = live
    bill, _ = await ask(front, "r")
    early = datetime.now(UTC) - timedelta(hours=1)
    cards.write_text(FIRST + card_text("second", early, miss="3.00"))
    await books.look()
    assert books.num_refused == 1 and front.accounts.cards.quote("antefix-tiny", datetime.now(UTC)).version == "first"
    # A card that already applied is also refused if it has changed or is missing.
    for text in (FIRST.replace('"1.00"', '"3.00"'), card_text("other", datetime(2020, 1, 1, tzinfo=UTC))):
        cards.write_text(text)
        await books.look()
    assert books.num_refused == 3
    cards.write_text(FIRST + card_text("second", datetime.now(UTC) + timedelta(milliseconds=1), miss="3.00"))
    await books.look()
    assert books.num_changes == 1 and bill.record.rate_card == "first"


async def test_a_card_that_asks_for_it_prices_again_and_changes_no_record(tmp_path, live):
    front, books, _, cards = live
    bill, _ = await ask(front, "r")
    written = (tmp_path / "ledger").glob("usage-*").__next__().read_bytes()
    cards.write_text(FIRST + card_text("second", datetime.now(UTC) - timedelta(hours=1), "3.00", "rerate = true"))
    await books.look()
    (record,) = [item.record for item in read_settled(tmp_path / "ledger")]
    (adjusted,) = [item.adjustment for item in read_billed(tmp_path / "ledger") if isinstance(item, Adjusted)]
    assert record == bill.record and adjusted.amount == Decimal("2.00") * 36 / 10**6
    assert (adjusted.kind, adjusted.rate_card, adjusted.of_event) == ("rerate", "second", record.event_id)
    assert (tmp_path / "ledger").glob("usage-*").__next__().read_bytes().startswith(written.rstrip(b"\0"))
    await books.look(is_asked=True)
    assert len([item for item in read_billed(tmp_path / "ledger") if isinstance(item, Adjusted)]) == 1


def test_a_rerating_goes_on_from_earlier_ones_and_from_attempts_before(tmp_path):
    from antefix_billing.pricing import priced
    from antefix_billing.usage_record import Status
    from tests.billing.usage_records import record

    files = {name: tmp_path / f"{name}.toml" for name in ("one", "three")}
    files["one"].write_text(FIRST)
    files["three"].write_text(card_text("three", datetime(2020, 1, 1, tzinfo=UTC), "3.00"))
    one, three = (load_cards([files[name]]) for name in ("one", "three"))
    first = priced(record(hit=0, miss=100, status=Status.CANCELLED, output_tokens=0), one)
    second = priced(record(hit=0, miss=100, attempt=2, paid_before=first.paid, output_tokens=5), one)
    ledger = Ledger(tmp_path / "ledger")
    ledger.append([first])
    ledger.append([second])

    def rerate(cards):
        items = list(read_billed(tmp_path / "ledger"))
        found = list(rerated(items, cards, chosen=lambda record: True, now_us=1, reason="r"))
        ledger.append(found)
        return found

    assert [each.amount for each in rerate(three)] == [Decimal("0.0002")]
    assert rerate(three) == []
    assert [each.amount for each in rerate(one)] == [Decimal("-0.0002")]
    assert [each.amount for each in rerate(three)] == [Decimal("0.0002")]
    ledger.close()


async def test_an_adjustment_reaches_the_ledger_of_a_running_router_once(tmp_path, live):
    front, books, _, _ = live
    await ask(front, "r")
    credit = Adjustment(
        adjustment_id="ticket-1", kind=AdjustmentKind.CREDIT, tenant="acme", request_id="r", amount=Decimal("-0.01"),
        currency="USD", reason="late", source=front.accounts.ledger.source_name, created_us=1,
    )  # fmt: skip
    inbox = tmp_path / "ledger" / "inbox"
    inbox.mkdir()
    for name in ("1.json", "2.json"):
        (inbox / name).write_text(json.dumps([credit.to_dict()]))
    (inbox / "3.json").write_text("[{}]")
    await books.look()
    assert [item.adjustment for item in read_billed(tmp_path / "ledger") if isinstance(item, Adjusted)] == [credit]
    assert sorted(path.name for path in inbox.iterdir()) == ["3.refused"]


def test_an_adjustment_of_a_ledger_without_a_router_is_written_at_once(tmp_path):
    Ledger(tmp_path / "ledger").close()
    made = Adjustment(
        adjustment_id="a", kind=AdjustmentKind.CORRECTION, tenant="acme", amount=Decimal("1.5"), currency="USD",
        reason="r", source="antefix/00", created_us=1,
    )  # fmt: skip
    adjust(tmp_path / "ledger", [made, made])
    adjust(tmp_path / "ledger", [made])
    (written,) = read_billed(tmp_path / "ledger")
    assert written.adjustment == made and Adjustment.from_payload(made.to_payload()) == made
    with pytest.raises(InvalidRequest, match="decimals"):
        Adjustment(**{**made.to_dict(), "kind": made.kind, "amount": Decimal("0.0000000000001")})


def started(tmp_path, cards, ledger="ledger"):
    """The books of a router that starts with these cards and the existing ledger."""
    path = tmp_path / "cards.toml"
    path.write_text(cards)
    front = make_front(Script(hit=64), ledger=tmp_path / ledger, cards=load_cards([path]))
    return front, LiveBooks(Files("", (str(path),)), front)


async def ran(tmp_path, cards, *ids):
    front, books = started(tmp_path, cards)
    await books._begin()
    for each in ids:
        await ask(front, each)
    await front.accounts.close()


YESTERDAY = datetime.now(UTC) - timedelta(days=1)
DEARER = card_text("second", YESTERDAY, miss="3.00")


async def test_a_start_with_a_card_from_before_priced_records_is_refused(tmp_path):
    await ran(tmp_path, FIRST, "r")
    for text in (FIRST + DEARER, FIRST.replace('"1.00"', '"3.00"'), ""):
        path = tmp_path / "cards.toml"
        path.write_text(text)
        front = make_front(Script(), ledger=tmp_path / "ledger", cards=load_cards([path]))
        with pytest.raises(ConfigError, match="records since then are priced already"):
            LiveBooks(Files("", (str(path),)), front)
        await front.accounts.close()
    # A card that applies from a later time is accepted, and the change is noted.
    await ran(tmp_path, FIRST + card_text("second", datetime.now(UTC) + timedelta(hours=1), miss="3.00"), "s")
    assert [change.kind for change in changes(tmp_path)] == ["rate_cards"]


async def test_a_start_with_a_card_that_asks_for_it_prices_again_once(tmp_path):
    await ran(tmp_path, FIRST, "r")
    dearer = FIRST + DEARER.replace("prices =", "rerate = true\nprices =")
    for _ in range(2):
        await ran(tmp_path, dearer)
    items = list(read_billed(tmp_path / "ledger"))
    (adjusted,) = [item.adjustment for item in items if isinstance(item, Adjusted)]
    assert (adjusted.kind, adjusted.rate_card) == (AdjustmentKind.RERATE, "second") and adjusted.amount > 0


async def test_a_rerating_that_a_crash_broke_off_is_gone_on_with(tmp_path, monkeypatch):
    await ran(tmp_path, FIRST, "r", "s")
    dearer = FIRST + DEARER.replace("prices =", "rerate = true\nprices =")
    front, books = started(tmp_path, dearer)

    async def die(*_):
        raise RuntimeError

    monkeypatch.setattr(LiveBooks, "_rerate", die)
    with pytest.raises(RuntimeError):
        await books._begin()
    await ask(front, "t")
    await front.accounts.close()
    monkeypatch.undo()
    await ran(tmp_path, dearer)
    adjusted = [item.adjustment for item in read_billed(tmp_path / "ledger") if isinstance(item, Adjusted)]
    assert sorted(each.request_id for each in adjusted) == ["r", "s"]


async def test_records_that_the_new_cards_priced_before_a_crash_are_no_reason_to_refuse(tmp_path):
    front, books = started(tmp_path, FIRST)
    cards = tmp_path / "cards.toml"
    await books._begin()
    await ask(front, "r")
    # A request's card is chosen by the whole second.
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
    cards.write_text(FIRST + card_text("second", soon, miss="3.00"))
    kept = (tmp_path / "ledger" / "ratecards.json").read_text()
    await books.look()
    await asyncio.sleep((soon - datetime.now(UTC)).total_seconds())
    bill, _ = await ask(front, "s")
    assert bill.record.rate_card == "second"
    await front.accounts.close()
    (tmp_path / "ledger" / "ratecards.json").write_text(kept)
    await ran(tmp_path, cards.read_text(), "t")
    assert [item.record.rate_card for item in read_settled(tmp_path / "ledger")] == ["first", "second", "second"]
