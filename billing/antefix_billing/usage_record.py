"""One usage record: what a request used, with evidence for its hit. This module knows no protobuf and no file.

    prompt_tokens = cache_hit_tokens + cache_miss_tokens
    cache_hit_tokens = hit_memory_tokens + hit_store_tokens, and where hit_tiers is known, its sum is hit_store_tokens
    cache_write_tokens is part of cache_miss_tokens, reasoning_tokens of output_tokens

A record that breaks one of these rules cannot be created. The payload is canonical JSON: sorted keys, no spaces, money
as decimal strings. So the same record always has the same bytes and the same hash.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any, Final
from urllib.parse import quote

from antefix.checked_files import parse_json
from antefix.checked_table import shown
from antefix.errors import InternalError, InvalidRequest
from antefix.miss_reason import MissReason
from antefix.usage import Evidence, Usage, tiers_of_text

# The version of the payload's fields. A reader refuses a version that it does not know.
PAYLOAD_VERSION: Final = 1


class Status(StrEnum):
    """How a request ended. The values of this enum are part of the ledger's format, so they are never renamed."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"
    CRASHED = "crashed"

    @property
    def is_ours(self) -> bool:
        """Whether the service, not the client, ended the request. In that case the client is charged only for the
        output that it was given, and a retry does not count as one more request.
        """
        return self in (Status.FAILED, Status.CRASHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenEntry:
    """A request that was admitted. The opening record of a request is written before its first token is sent, so that a
    crash leaves a trace of the request.

    request_digest: keyed hash of prompt and sampling settings, in hex; a retry must have the same. started_us: Unix
    microseconds.
    """

    request_id: str
    attempt: int
    tenant: str
    user: str
    model: str
    revision: str
    fingerprint: str
    request_digest: str
    prompt_tokens: int
    started_us: int
    key_id: str = ""

    @property
    def key(self) -> str:
        return request_key(self.tenant, self.request_id)

    @property
    def event_id(self) -> str:
        return event_id(self.key, self.attempt)

    def to_payload(self) -> bytes:
        values = {"v": PAYLOAD_VERSION, **self.to_dict()}
        if not self.key_id:
            del values["key_id"]
        return _canonical(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. `to_dict` is called for every request, so it avoids the deep copies of `asdict`."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_payload(cls, payload: bytes) -> OpenEntry:
        """Raises:  InvalidRequest: fields are missing, unknown, or of another type."""
        values = _fields_of(payload)
        _check_types(values, _OPEN_TYPES)
        try:
            return cls(**values)
        except TypeError as err:
            raise InvalidRequest(f"not an open entry: {err}") from err


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRecord(Usage):
    """One request at its end. Times are Unix microseconds, hashes hex, money in `currency`.

    attempt: 1, or more when an earlier attempt broke off.  paid_before: the amount that earlier attempts were charged;
    it is subtracted from this attempt's price, so that no part of the request is paid for twice.  source: the router's
    ledger; (source, event_id) is unique. mode: how the model thought ("off", "low", "high", "max"); empty for a prompt
    that is not a conversation. write_error: why some computed blocks could not be stored; empty if all were.
    prefix_volatile: the client's prompts begin with text that changes each time, so everything after it misses.
    prompt_marks: a few block hashes of the prompt (`antefix.prompt_marks`), which show later where two prompts begin to
    differ. key_id: the id of the API key used; empty for a key from a tenants file, or no key. saved: what the hit
    tokens would have cost more as misses. detail: an error's class; never prompt text.
    """

    request_id: str
    attempt: int = 1
    source: str
    tenant: str = ""
    user: str = ""
    model: str
    revision: str = ""
    fingerprint: str = ""
    request_digest: str = ""
    write_error: str = ""
    status: Status
    detail: str = ""
    rate_card: str = ""
    currency: str = ""
    price: Decimal = Decimal(0)
    paid_before: Decimal = Decimal(0)
    saved: Decimal = Decimal(0)
    started_us: int
    finished_us: int
    mode: str = ""
    prefix_volatile: bool = False
    prompt_marks: str = ""
    key_id: str = ""

    @classmethod
    def of(cls, used: Usage, **of_the_end: Any) -> UsageRecord:
        """The record made from a request's usage and how it ended.  Raises:  as the constructor."""
        return cls(**dict(zip(_USED, _used_values(used), strict=True)), **of_the_end)

    def __post_init__(self) -> None:
        """Raises:  InternalError: the counts contradict each other."""
        if min(counts := _counts(self)) < 0:
            name, number = next((name, number) for name, number in zip(_COUNTS, counts, strict=True) if number < 0)
            raise InternalError(f"usage record of request {self.request_id}: {name} is impossible: {number}")
        rules = (
            (
                self.cache_write_1h_tokens <= self.cache_write_tokens,
                "tokens kept for an hour must be part of the written ones",
            ),
            (
                self.cache_write_tokens <= self.cache_miss_tokens,
                "written prompt tokens must be part of the missed ones",
            ),
            (self.reasoning_tokens <= self.output_tokens, "reasoning tokens must be part of the output"),
            (
                bool(self.last_hit_hash) == self.is_proved_hit,
                "a proved hit, and nothing else, must have the hash of its last block",
            ),
            (self._tiers_add_up(), "the tokens of the named tiers must add up to the hit in stores"),
            (self.finished_us >= self.started_us, "a request cannot end before it starts"),
            (self.price >= 0 and self.saved >= 0 and self.paid_before >= 0, "money must not be negative"),
            (self.is_charged or self.price == 0, "a request that Antefix failed is charged only if output was given"),
            (self.attempt > 1 or self.paid_before == 0, "nothing can have been paid before the first attempt"),
            (self.attempt >= 1 and bool(self.request_id), "a record needs a request id and an attempt from 1 on"),
        )
        for holds, rule in rules:
            if not holds:
                raise InternalError(f"usage of {self.request_id!r}: {rule}")

    def _tiers_add_up(self) -> bool:
        if not self.hit_tiers:
            return True
        try:
            tiers = tiers_of_text(self.hit_tiers)
        except ValueError:
            return False
        return bool(tiers) and min(tiers.values()) > 0 and sum(tiers.values()) == self.hit_store_tokens

    @property
    def key(self) -> str:
        return request_key(self.tenant, self.request_id)

    @property
    def is_proved_hit(self) -> bool:
        """Whether the record has a hit and evidence that proves it."""
        return self.cache_hit_tokens > 0 and self.evidence is Evidence.PROVED

    @property
    def is_charged(self) -> bool:
        """Whether the request is charged. If the client ended the request, the work that was done is charged. If the
        service failed, only the output that the client was given is charged.
        """
        return not self.status.is_ours or self.output_tokens > 0

    @property
    def is_final(self) -> bool:
        """Whether this is the last record under its id: the answer is complete. An attempt that broke off may be
        retried.
        """
        return self.status in (Status.STOP, Status.LENGTH)

    @property
    def paid(self) -> Decimal:
        """What this request has been charged so far, in all its attempts."""
        return self.paid_before + self.price

    @property
    def event_id(self) -> str:
        """Unique within `source`."""
        return event_id(self.key, self.attempt)

    def to_payload(self) -> bytes:
        values = {"v": PAYLOAD_VERSION, **self.to_dict()}
        # A missing field means its zero value. Most records leave these out, and so do all records from before the
        # fields existed.
        for name in _LEFT_OUT:
            if not getattr(self, name):
                del values[name]
        return _canonical(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; money as decimal strings without an exponent."""
        values: dict[str, Any] = dict(zip(FIELD_TYPES, _values(self), strict=True))
        values["price"] = format(self.price, "f")
        values["paid_before"] = format(self.paid_before, "f")
        values["saved"] = format(self.saved, "f")
        values["status"] = self.status.value
        values["miss_reason"] = self.miss_reason.value
        values["evidence"] = self.evidence.value
        return values

    @classmethod
    def from_payload(cls, payload: bytes) -> UsageRecord:
        return cls.from_dict(_fields_of(payload))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UsageRecord:
        """Raises:  InvalidRequest: unknown or malformed fields, or counts that contradict each other."""
        values = dict(values)
        try:
            values["status"] = Status(values["status"])
            values["miss_reason"] = MissReason(values["miss_reason"])
            values["evidence"] = Evidence(values.get("evidence", ""))
            values["price"], values["saved"] = money_of(values["price"]), money_of(values["saved"])
            values["paid_before"] = money_of(values.get("paid_before", "0"))
            _check_types(values, _RECORD_TYPES)
            derived = {name: values.pop(name, 0) for name in _DERIVED}
            record = cls(**values)
            for name, rule in _DERIVED.items():
                if derived[name] != getattr(record, name):
                    raise InvalidRequest(f"not a usage record: {rule}")
            return record
        except (KeyError, ValueError, TypeError, InvalidOperation, InternalError) as err:
            raise InvalidRequest(f"not a usage record: {err}") from err


_LEFT_OUT: Final = (
    *("paid_before", "mode", "write_error", "prefix_volatile", "prompt_marks"),
    *("evidence", "worker", "expected_hit_tokens", "hit_tiers"),
    *("cache_write_1h_tokens", "key_id"),
)
# Fields derived from others. The ledger's payload has them too, so that readers need not add up.
_DERIVED: Final = {
    "cache_miss_tokens": "hit + miss must be the prompt",
    "hit_store_tokens": "tiers must add up to the hit",
}
_USED: Final = tuple(field.name for field in dataclasses.fields(Usage))
_OWN: Final = tuple(field for field in dataclasses.fields(UsageRecord) if field.name not in _USED)
# All fields of a record in the order of exports: first the tenant and how the request ended, then what it used.
FIELD_TYPES: Final = {
    **{field.name: str(field.type) for field in (*_OWN, *dataclasses.fields(Usage))},
    **dict.fromkeys(_DERIVED, "int"),
}
_TYPES: Final = {"int": int, "str": str, "bool": bool}
_RECORD_TYPES: Final = {name: _TYPES[kind] for name, kind in FIELD_TYPES.items() if kind in _TYPES}
_OPEN_TYPES: Final = {
    field.name: _TYPES[str(field.type)] for field in dataclasses.fields(OpenEntry) if str(field.type) in _TYPES
}
_AMOUNT_DIGITS_MAX: Final = 40
_COUNTS: Final = tuple(name for name, kind in FIELD_TYPES.items() if kind == "int")
# Each gives many fields at once. They run for every request and every record read.
_used_values: Final = operator.attrgetter(*_USED)
_values: Final = operator.attrgetter(*FIELD_TYPES)
_counts: Final = operator.attrgetter(*_COUNTS)


def event_id(key: str, attempt: int) -> str:
    """Unique within a ledger."""
    return key if attempt == 1 else f"{key}/{attempt}"


def request_key(tenant: str, request_id: str) -> str:
    """The name of a request within the ledger. The key includes the tenant, because ids come from callers and two
    tenants may choose the same one.
    """
    return f"{_quoted(tenant)}:{request_id}" if tenant else request_id


@functools.lru_cache(1024)
def _quoted(tenant: str) -> str:
    return quote(tenant, safe="")


def _check_types(values: dict[str, Any], types: Mapping[str, type]) -> None:
    """Raises:  InvalidRequest: a number, a text or a boolean has another type."""
    for name, value in values.items():
        wanted = types.get(name)
        if wanted is not None and type(value) is not wanted:
            raise InvalidRequest(f"{name} must be of type {wanted.__name__}, is {shown(value)}")


def money_of(value: object) -> Decimal:
    """The amount of money in a record: a text, or the number 0.  Raises:  InvalidRequest."""
    amount = Decimal(value) if isinstance(value, str | int) else Decimal("NaN")
    if not amount.is_finite() or amount.adjusted() > _AMOUNT_DIGITS_MAX:
        raise InvalidRequest(f"an amount must be a number of at most {_AMOUNT_DIGITS_MAX} digits, is {shown(value)}")
    return amount


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _fields_of(payload: bytes) -> dict[str, Any]:
    values = parse_json(payload, "a ledger payload")
    if not isinstance(values, dict):
        raise InvalidRequest("the payload of a ledger entry is not a JSON object")
    if values.pop("v", None) != PAYLOAD_VERSION:
        raise InvalidRequest(
            f"the payload of a ledger entry is not of version {PAYLOAD_VERSION}; a newer Antefix wrote it"
        )
    return values
