"""What stands behind a fingerprint, written down in the index: tokens in a block, plans of payloads, a statement."""

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
    """block_tokens: 0: not known.  statement: empty: nobody says what the fingerprint stands for.

    Raises:  FingerprintMismatch: its blocks are known, and of another size.
    """
    known = txn.fingerprint(fingerprint)
    if known is not None and known.block_tokens and block_tokens not in (0, known.block_tokens):
        raise FingerprintMismatch(
            f"a block has {block_tokens} tokens, and {known.block_tokens} where KV of this name is stored:"
            " nothing of it is used; give the worker the model and block size of the others, or a"
            " --namespace of its own"
        )
    txn.set_fingerprint(fingerprint, block_tokens or (known.block_tokens if known else 0))
    if statement:
        txn.set_meta(STATEMENT_PREFIX + fingerprint, statement)
    set_plans(txn, ((fingerprint, kind, plan) for kind, plan in plans.items()))


def set_plans(txn: IndexTxn, plans: Iterable[tuple[bytes, RecordKind, codec.PlanePlan]]) -> None:
    """Each of a fingerprint and a kind of record."""
    for fingerprint, kind, plan in plans:
        txn.set_meta(PLAN_PREFIX + bytes([kind]) + fingerprint, plan.encoded)
