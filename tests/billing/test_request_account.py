"""The account of one request that routers share: claims, take-overs, and the credit if two routers charged it."""

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from antefix_billing.ledger_files import Settled
from antefix_billing.request_account import RequestAccount, RunningAt, claim, let_go, settle
from antefix_billing.usage_record import Status
from tests.billing.usage_records import NOW_US, record

ONE, TWO = RunningAt(source="antefix/1", instance="a"), RunningAt(source="antefix/2", instance="b")


def settled(price, *, source="antefix/1", attempt=1, paid_before="0", status=Status.STOP, sequence=2):
    made = record(price=Decimal(price), source=source, attempt=attempt, paid_before=Decimal(paid_before), status=status)
    return Settled(sequence=sequence, hash=b"h" * 32, previous_hash=b"p" * 32, record=made)


def test_a_request_runs_at_one_living_router():
    account = claim(RequestAccount(), ONE, [ONE, TWO])
    assert claim(account, TWO, [ONE, TWO]) is None
    assert claim(account, TWO, [TWO]).running == TWO
    successor = RunningAt(source="antefix/1", instance="restarted")
    assert claim(account, TWO, [successor, TWO]).running == TWO
    assert let_go(account, TWO) == account and let_go(account, ONE).running is None


def test_what_was_written_reads_back():
    account, _ = settle(claim(RequestAccount(), ONE, []), settled("0.25"))
    account = claim(account, TWO, [])
    assert RequestAccount.from_json(account.to_json()) == account


def test_the_same_record_again_changes_nothing():
    once, credit = settle(RequestAccount(), settled("0.25"))
    assert settle(once, settled("0.25")) == (once, credit) and credit == 0


def test_two_charges_of_one_request_cost_what_the_dearer_does():
    account, _ = settle(RequestAccount(), settled("0.25"))
    account, credit = settle(account, settled("0.30", source="antefix/2"))
    assert (credit, account.paid) == (Decimal("0.25"), Decimal("0.30"))


def test_after_redis_lost_its_memory_a_credit_is_not_given_twice():
    _, credit = settle(settle(RequestAccount(), settled("0.30"))[0], settled("0.25", source="antefix/2"))
    assert credit == Decimal("0.25")
    # The charges arrive again in reverse order. The second router's ledger has already given its credit.
    account, again = settle(RequestAccount(), settled("0.25", source="antefix/2"), credited=credit)
    account, other = settle(account, settled("0.30"))
    assert (again, other, account.paid) == (credit, 0, Decimal("0.30"))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50)), min_size=1, max_size=6))
def test_whatever_routers_charge_a_request_costs_its_dearest_attempt(charges):
    account, total, attempts = RequestAccount(), Decimal(0), [0, 0, 0]
    for router, price in charges:
        attempts[router] += 1
        item = settled(
            Decimal(price) / 100, source=f"antefix/{router}", attempt=attempts[router], status=Status.CANCELLED
        )
        account, credit = settle(account, item)
        total += item.record.price - credit
    assert total == account.paid == Decimal(max(price for _, price in charges)) / 100
    assert account.last.record.finished_us == NOW_US + 1_000_000
