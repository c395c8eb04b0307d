"""One record or adjustment in the form in which it is sent to any receiver. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from antefix_billing.adjustment import Adjusted
from antefix_billing.export import cloud_event
from antefix_billing.ledger_files import Settled


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """id: stays the same when the item is sent again, and is unique. customer: the name that the receiving system uses
    for the tenant.

    event: the CloudEvent.  counts: tokens, by the record's field names; empty for an adjustment.
    """

    id: str
    tenant: str
    customer: str
    time_us: int
    sequence: int
    event: dict[str, Any]
    counts: dict[str, int]
    amount: Decimal
    currency: str

    @property
    def seconds(self) -> int:
        return self.time_us // 1_000_000


def delivery_of(item: Settled | Adjusted, customer: str) -> Delivery:
    """Build the delivery of a ledger item.  customer: the receiver's name for the item's tenant."""
    event = cloud_event(item)
    event["subject"] = customer
    id = hashlib.blake2b(f"{event['source']} {event['id']}".encode(), digest_size=16).hexdigest()
    if isinstance(item, Adjusted):
        made = item.adjustment
        return Delivery(
            id=id,
            tenant=made.tenant,
            customer=customer,
            time_us=made.created_us,
            sequence=item.sequence,
            event=event,
            counts={},
            amount=made.amount,
            currency=made.currency,
        )
    record = item.record
    counts = {name: value for name, value in event["data"].items() if name.endswith("_tokens")}
    return Delivery(
        id=id,
        tenant=record.tenant,
        customer=customer,
        time_us=record.finished_us,
        sequence=item.sequence,
        event=event,
        counts=counts,
        amount=record.price,
        currency=record.currency,
    )
