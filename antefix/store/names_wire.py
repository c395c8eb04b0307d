"""Converts record names, and the reasons for refusing records, between Python values and protobuf messages."""

from __future__ import annotations

from antefix.record import RecordName, RefusalReason
from antefix.v1 import kvstore_pb2


def name_to_wire(name: RecordName) -> kvstore_pb2.RecordName:
    return kvstore_pb2.RecordName(kind=name[0].value, hash=name[1])  # type: ignore[arg-type]


def refusal_reason_of(code: str) -> RefusalReason:
    return RefusalReason(code) if code in set(RefusalReason) else RefusalReason.OTHER
