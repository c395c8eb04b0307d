"""What all routers of a deployment know about one request: which router runs it, how it ended, what it was charged.
Pure.

Several routers change this account one after the other (`antefix_router.shared_bill`): each calls `claim` before it
runs the request, and `settle` after its record is in the ledger. A request costs as much as its most expensive attempt,
whichever routers ran its attempts. If two routers could not see each other and together charged more, the excess is
returned as a credit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from antefix.checked_files import parse_json
from antefix.errors import InvalidRequest
from antefix_billing.ledger_files import Settled
from antefix_billing.usage_record import UsageRecord, money_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningAt:
    """The router that runs a request.  source: the router's ledger.  instance: the router's process, to distinguish a
    dead process from its successor.
    """

    source: str
    instance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAccount:
    """last: the ended attempt from which a retry continues.  charged: for each record, by source and event id, its
    price minus credits.  dearest: the highest price that any single attempt would have alone.
    """

    running: RunningAt | None = None
    last: Settled | None = None
    charged: dict[str, Decimal] = field(default_factory=dict)
    credits: dict[str, Decimal] = field(default_factory=dict)
    dearest: Decimal = Decimal(0)

    @property
    def paid(self) -> Decimal:
        """The amount charged for all attempts, minus credits."""
        return sum(self.charged.values(), Decimal(0))

    def to_json(self) -> str:
        values = {
            "running": dataclasses.asdict(self.running) if self.running else None,
            "last": _settled_to_dict(self.last) if self.last else None,
            "charged": {name: format(amount, "f") for name, amount in self.charged.items()},
            "credits": {name: format(amount, "f") for name, amount in self.credits.items()},
            "dearest": format(self.dearest, "f"),
        }
        return json.dumps(values, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> RequestAccount:
        """Raises:  InvalidRequest: the text was not written by `to_json`."""
        values = parse_json(text if isinstance(text, bytes) else text.encode(), "a request's account")
        try:
            running, last = values["running"], values["last"]
            return cls(
                running=RunningAt(**running) if running else None,
                last=_settled_from_dict(last) if last else None,
                charged={str(name): money_of(amount) for name, amount in values["charged"].items()},
                credits={str(name): money_of(amount) for name, amount in values["credits"].items()},
                dearest=money_of(values["dearest"]),
            )
        except (KeyError, ValueError, TypeError, AttributeError) as err:
            raise InvalidRequest(f"not a request's account: {err}") from err


def claim(account: RequestAccount, me: RunningAt, alive: Collection[RunningAt]) -> RequestAccount | None:
    """The account with the request marked as running here. Returns None if another live router runs the request."""
    running = account.running
    if running is not None and running != me and running in alive:
        return None
    return dataclasses.replace(account, running=me)


def let_go(account: RequestAccount, me: RunningAt) -> RequestAccount:
    """The account without this router's claim. No work was done for the request whose claim is released."""
    return dataclasses.replace(account, running=None) if account.running == me else account


def settle(
    account: RequestAccount, settled: Settled, *, credited: Decimal = Decimal(0)
) -> tuple[RequestAccount, Decimal]:
    """The account after a record was added that is in the ledger already, and the amount to return to the customer
    because of it.

    credited: the amount that this record's ledger has already returned for it. Calling this again with the same record
    changes nothing and returns the same amount.
    """
    record = settled.record
    name = f"{record.source} {record.event_id}"
    running = None if account.running is not None and account.running.source == record.source else account.running
    if name in account.charged:
        return dataclasses.replace(account, running=running), account.credits.get(name, Decimal(0))
    dearest = max(account.dearest, record.paid)
    credit = max(credited, account.paid + record.price - dearest)
    credits = {**account.credits, name: credit} if credit else account.credits
    changed = RequestAccount(
        running=running,
        last=_later(account.last, settled),
        charged={**account.charged, name: record.price - credit},
        credits=credits,
        dearest=dearest,
    )
    return changed, credit


def _later(one: Settled | None, other: Settled) -> Settled:
    """Which of two ended attempts a retry continues from: a completed answer if there is one, otherwise the later
    attempt.
    """
    return other if one is None or rank(other.record) >= rank(one.record) else one


def rank(record: UsageRecord) -> tuple[bool, int, int]:
    """A sort key. A retry continues from the record of the request with the greatest key."""
    return (record.is_final, record.attempt, record.finished_us)


def _settled_to_dict(settled: Settled) -> dict[str, Any]:
    return {
        "sequence": settled.sequence,
        "hash": settled.hash.hex(),
        "previous_hash": settled.previous_hash.hex(),
        "payload": settled.record.to_payload().decode(),
    }


def _settled_from_dict(values: dict[str, Any]) -> Settled:
    return Settled(
        sequence=int(values["sequence"]),
        hash=bytes.fromhex(values["hash"]),
        previous_hash=bytes.fromhex(values["previous_hash"]),
        record=UsageRecord.from_payload(values["payload"].encode()),
    )
