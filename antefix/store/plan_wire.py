"""Converts plane plans (how a fingerprint's payloads are split into byte planes) from and to protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antefix.record import RecordKind
from antefix.store_files import codec
from antefix.v1 import kvstore_pb2


def plans_to_wire(plans: Mapping[RecordKind, codec.PlanePlan]) -> dict[str, Any]:
    """The fields of a RegisterRequest that carry the plans."""
    return {
        "parts": _parts(plans[RecordKind.BLOCK]) if RecordKind.BLOCK in plans else (),
        "checkpoint_parts": _parts(plans[RecordKind.CHECKPOINT]) if RecordKind.CHECKPOINT in plans else (),
    }


def plans_from_wire(message: kvstore_pb2.RegisterRequest) -> dict[RecordKind, codec.PlanePlan]:
    return {
        kind: codec.PlanePlan(
            parts=tuple(
                codec.PlanePart(num_rows=part.num_rows, fields=tuple((f.nbytes, f.width) for f in part.fields))
                for part in parts
            )
        )
        for kind, parts in ((RecordKind.BLOCK, message.parts), (RecordKind.CHECKPOINT, message.checkpoint_parts))
        if parts
    }


def _parts(plan: codec.PlanePlan) -> list[kvstore_pb2.PayloadPart]:
    return [
        kvstore_pb2.PayloadPart(
            num_rows=part.num_rows,
            fields=[kvstore_pb2.PayloadField(nbytes=nbytes, width=width) for nbytes, width in part.fields],
        )
        for part in plan.parts
    ]
