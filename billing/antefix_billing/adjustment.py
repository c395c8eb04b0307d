"""Adjustments change a bill after its records were written: credits, corrections, disputes, re-ratings.

The ledger never rewrites a record. An adjustment is an entry of the ledger like a record, chained and durable. The
adjustment's `amount` is added to what the request or the tenant was charged; a credit is negative. Writing a second
adjustment with the same id changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from antefix.checked_files import parse_json
from antefix.errors import InvalidRequest
from antefix_billing.usage_record import PAYLOAD_VERSION, money_of, request_key

# Enough for a reason and a ticket's address. An entry of the ledger has a maximum size.
TEXT_CHARACTERS_MAX: Final = 1000
# Money has twelve decimals everywhere in the bill.
DECIMALS_MAX: Final = 12


class AdjustmentKind(StrEnum):
    """The values of this enum are part of the ledger's format, so they are never renamed."""

    CREDIT = "credit"
    CORRECTION = "correction"
    # A charge that a customer contests. It is taken off the bill until the dispute is decided.
    DISPUTE = "dispute"
    RERATE = "rerate"
    # Two routers charged one request, because Redis or one of the routers was down meanwhile. The customer gets back
    # all charges except that of the most expensive attempt.
    CHARGED_TWICE = "charged_twice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """An adjustment of a bill.

    amount: the signed amount, in `currency`, that is added to the bill.  of_event, of_source: the `event_id` of the
    adjusted record, and the ledger that holds the record; both are empty if the adjustment concerns a tenant as a
    whole.  author: who asked for the adjustment.  rate_card: the card that a re-rating priced the record by.
    """

    adjustment_id: str
    kind: AdjustmentKind
    tenant: str
    amount: Decimal
    currency: str
    reason: str
    source: str
    created_us: int
    user: str = ""
    model: str = ""
    request_id: str = ""
    of_event: str = ""
    of_source: str = ""
    rate_card: str = ""
    reference: str = ""
    author: str = ""

    def __post_init__(self) -> None:
        """Raises:  InvalidRequest: the id or the reason is empty, the amount is not finite or has too many decimals, or
        a text is too long.
        """
        if not self.adjustment_id or not self.reason:
            raise InvalidRequest("an adjustment of a bill needs an id and a reason")
        if not self.amount.is_finite() or self.amount.as_tuple().exponent < -DECIMALS_MAX:  # type: ignore[operator]
            raise InvalidRequest(f"an adjustment's amount has at most {DECIMALS_MAX} decimals, is {self.amount}")
        for name in ("adjustment_id", "reason", "reference", "author", "request_id", "of_event"):
            if len(getattr(self, name)) > TEXT_CHARACTERS_MAX:
                raise InvalidRequest(f"an adjustment's {name} takes at most {TEXT_CHARACTERS_MAX} characters")

    @property
    def key(self) -> str:
        """The name by which the ledger finds this adjustment. The name cannot equal a request's key: it begins with a
        control character, and request ids have none.
        """
        return f"\x00adjustment:{self.adjustment_id}"

    @property
    def request_key(self) -> str:
        return request_key(self.tenant, self.request_id)

    def to_dict(self) -> dict[str, Any]:
        """The adjustment as plain JSON values; money is a decimal string without an exponent."""
        return {**dataclasses.asdict(self), "kind": self.kind.value, "amount": format(self.amount, "f")}

    def to_payload(self) -> bytes:
        values = {name: value for name, value in self.to_dict().items() if value != ""}
        return json.dumps(
            {"v": PAYLOAD_VERSION, **values}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()

    @classmethod
    def from_payload(cls, payload: bytes) -> Adjustment:
        values = parse_json(payload, "a ledger payload")
        if not isinstance(values, dict) or values.pop("v", None) != PAYLOAD_VERSION:
            raise InvalidRequest("the entry is not an adjustment in this version's format")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Adjustment:
        """Raises:  InvalidRequest: unknown, missing or malformed fields."""
        values = {"currency": "", "tenant": "", **values}
        try:
            kind = AdjustmentKind(values.pop("kind"))
            amount = money_of(values.pop("amount"))
            for name, value in values.items():
                wanted = int if name == "created_us" else str
                if type(value) is not wanted:
                    raise InvalidRequest(f"an adjustment's {name} must be of type {wanted.__name__}")
            return cls(kind=kind, amount=amount, **values)
        except (KeyError, ValueError, TypeError) as err:
            raise InvalidRequest(f"not an adjustment: {err}") from err


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjusted:
    """An adjustment with its place in the ledger."""

    sequence: int
    hash: bytes
    previous_hash: bytes
    adjustment: Adjustment


class ChangeKind(StrEnum):
    """The values of this enum are part of the ledger's format, so they are never renamed."""

    TENANTS = "tenants"
    RATE_CARDS = "rate_cards"
    PRUNED = "pruned"
    API_KEYS = "api_keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change made while the router ran, or a change to the ledger itself. content: JSON text with the settings that
    are in force from this entry on.
    """

    kind: ChangeKind
    content: str
    created_us: int

    def to_payload(self) -> bytes:
        values = {"v": PAYLOAD_VERSION, **dataclasses.asdict(self), "kind": self.kind.value}
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_payload(cls, payload: bytes) -> Change:
        values = parse_json(payload, "a ledger payload")
        try:
            return cls(
                kind=ChangeKind(values["kind"]), content=str(values["content"]), created_us=int(values["created_us"])
            )
        except (KeyError, ValueError, TypeError) as err:
            raise InvalidRequest(f"not a change: {err}") from err
