"""Converts `BlockFate`, the reason why a block was not found, from and to protobuf.

The protobuf names "stored" and "unknown" are older than `MissReason`, so they stay.
"""

from __future__ import annotations

from typing import Final

from antefix.miss_reason import MissReason
from antefix.record import BlockFate
from antefix.v1 import kvstore_pb2

_OWN_WORDS: Final = {MissReason.NONE: "stored", MissReason.FIRST_SEEN: "unknown"}
_REASONS: Final = {word: reason for reason, word in _OWN_WORDS.items()}


def fate_to_wire(found: BlockFate) -> kvstore_pb2.FateResponse:
    return kvstore_pb2.FateResponse(
        fate=_OWN_WORDS.get(found.reason, found.reason.value),
        fingerprints=found.fingerprints,
        statements=found.statements,
    )


def fate_from_wire(message: kvstore_pb2.FateResponse) -> BlockFate:
    return BlockFate(
        reason=_REASONS.get(message.fate, MissReason(message.fate or MissReason.UNKNOWN)),
        fingerprints=tuple(message.fingerprints),
        # A service of version 1 sends no statements.
        statements=tuple(message.statements) or (b"",) * len(message.fingerprints),
    )
