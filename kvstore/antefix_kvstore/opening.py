"""What an engine does once after it has opened a store, before it serves anybody."""

from __future__ import annotations

from antefix.record import RecordKind
from antefix.store_files import codec
from antefix.store_files.encryption import KeyRing
from antefix.store_files.hit_log import StoreLog
from antefix.store_files.index import Index
from antefix.store_files.record_format import RecordFlag
from antefix_kvstore.compression import Compression
from antefix_kvstore.index_forest import drop_subtrees
from antefix_kvstore.index_writer import PLAN_PREFIX, IndexTxn
from antefix_kvstore.segments import Segments
from antefix_kvstore.space import Space


def drop_locked(index: Index, space: Space, keys: KeyRing) -> None:
    """Forget the records of tenants whose keys are gone: nobody can decrypt these records any more."""
    with IndexTxn(index) as txn:
        # Keys that are configured by tenant name do not tell which digests they belong to.
        judged = {number: owner for number, owner in txn.owners().items() if keys.is_complete or owner[:1] == b"t"}
        locked = {number for number, owner in judged.items() if owner not in keys}
        if locked:
            names = [
                name
                for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT)
                for name, entry in txn.names(kind)
                if entry.tenant_id in locked and entry.flags & RecordFlag.ENCRYPTED
            ]
            drop_subtrees(txn, space, names)


def log_newest(segments: Segments, log: StoreLog) -> None:
    """Log the blocks of the last two segments as stored: the process may have crashed between a commit and its log
    entry.
    """
    for number in sorted(segments.sizes)[-2:]:
        headers = segments.scan(number, check_payloads=False)
        log.stored([header.hash for header in headers if header.kind is RecordKind.BLOCK])


def load_plans(index: Index, compression: Compression) -> None:
    """Load the payload layouts registered before, so that a restarted service can compress before its workers
    restart.
    """
    with index.txn() as txn, txn.cursor(db=index.db["meta"]) as cursor:
        for key, value in cursor:
            if key.startswith(PLAN_PREFIX):
                kind, fingerprint = RecordKind(key[len(PLAN_PREFIX)]), key[len(PLAN_PREFIX) + 1 :]
                compression.register(fingerprint, kind, codec.read_plan(value)[0])
