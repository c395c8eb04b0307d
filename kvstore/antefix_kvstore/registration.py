"""Stores in the index what a fingerprint means: tokens per block, payload layouts, a statement of what it was made
from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from antefix.errors import FingerprintMismatch
from antefix.record import RecordKind
from antefix.store_files import codec
from antefix.store_files.index import STATEMENT_PREFIX
from antefix_kvstore.index_writer import PLAN_PREFIX, IndexTxn


def register_fingerprint(
    txn: IndexTxn,
    fingerprint: bytes,
    block_tokens: int,
    plans: Mapping[RecordKind, codec.PlanePlan],
    statement: bytes,
) -> None:
    """block_tokens: tokens per block; 0: not known. statement: the settings that the fingerprint stands for; empty: not
    known.

    Raises:  FingerprintMismatch: the block size is known already, and is another.
    """
    known = txn.fingerprint(fingerprint)
    if known is not None and known.block_tokens and block_tokens not in (0, known.block_tokens):
        raise FingerprintMismatch(
            f"this worker's blocks have {block_tokens} tokens, but the KV stored under its fingerprint has blocks of"
            f" {known.block_tokens}: the worker can use none of it. Give the worker the same model and block size as"
            " the others, or a --namespace of its own"
        )
    txn.set_fingerprint(fingerprint, block_tokens or (known.block_tokens if known else 0))
    if statement:
        txn.set_meta(STATEMENT_PREFIX + fingerprint, statement)
    set_plans(txn, ((fingerprint, kind, plan) for kind, plan in plans.items()))


def set_plans(txn: IndexTxn, plans: Iterable[tuple[bytes, RecordKind, codec.PlanePlan]]) -> None:
    """Store the plans; each is for one fingerprint and one kind of record."""
    for fingerprint, kind, plan in plans:
        txn.set_meta(PLAN_PREFIX + bytes([kind]) + fingerprint, plan.encoded)
