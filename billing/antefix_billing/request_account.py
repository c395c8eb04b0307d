"""What all routers of a deployment know of one request: who runs it, how it ended, what it was charged. Pure.

Several routers change it one after the other (`antefix_router.shared_bill`), each with `claim` before it runs a request
and `settle` after its record is in the ledger. A request costs as much as its most expensive attempt, wherever those
ran: what is charged beyond that, because two routers could not see one another, goes back as a credit.
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
    """source: the router's ledger.  instance: of its process, so that one that died is told from its successor."""

    source: str
    instance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAccount:
    """last: of the attempts that ended, the one that counts for a retry.  charged: of each record, by source and event
    id, what is left of its price after credits.  dearest: the most that an attempt would cost alone.
    """

    running: RunningAt | None = None
    last: Settled | None = None
    charged: dict[str, Decimal] = field(default_factory=dict)
    credits: dict[str, Decimal] = field(default_factory=dict)
    dearest: Decimal = Decimal(0)

    @property
    def paid(self) -> Decimal:
        """In all attempts, after credits."""
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
        """Raises:  InvalidRequest: not what `to_json` writes."""
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
    """The account with the request running here; None where another router that is alive runs it."""
    running = account.running
    if running is not None and running != me and running in alive:
        return None
    return dataclasses.replace(account, running=me)


def let_go(account: RequestAccount, me: RunningAt) -> RequestAccount:
    """Nothing was done for it."""
    return dataclasses.replace(account, running=None) if account.running == me else account


def settle(
    account: RequestAccount, settled: Settled, *, credited: Decimal = Decimal(0)
) -> tuple[RequestAccount, Decimal]:
    """The account with a record that is in the ledger, and what goes back to the customer because of it.

    credited: what this record's ledger gave back for it before. The same record again changes nothing, and answers as
    it did.
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
    """Which of two ends a retry continues from: an answer that ended, else the later attempt."""
    return other if one is None or rank(other.record) >= rank(one.record) else one


def rank(record: UsageRecord) -> tuple[bool, int, int]:
    """Of the records of one request, the greatest is the one that a retry continues from."""
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
