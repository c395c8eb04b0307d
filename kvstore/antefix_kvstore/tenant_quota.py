"""Quotas: how much of the store a tenant may use. A tenant over its quota loses its own least valuable records (leaves)
only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from antefix.record import RecordName, Refusal, RefusalReason
from antefix.store_files.index import Index
from antefix.store_files.owners import Owners
from antefix_kvstore.index_writer import read_totals
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.segments import Draft
from antefix_kvstore.space import Space


class Quotas:
    """The quotas in force, by owner. Records that a tenant stored under several secrets, or by name, count together."""

    def __init__(self, config: KvStoreConfig, owners: Owners) -> None:
        """Raises:  ConfigError: a quota is given for a text that should be a digest and is none."""
        self._default_bytes = config.tenant_quota_bytes
        self._own_bytes: dict[bytes, int] = {}
        self._same: dict[bytes, tuple[bytes, ...]] = {}
        for tenant, nbytes in config.own_quotas.items():
            rows = owners.rows(tenant)
            self._own_bytes.update(dict.fromkeys(rows, nbytes))
            self._same.update(dict.fromkeys(rows, rows))

    def bytes_of(self, owner: bytes) -> int:
        """The owner's quota in bytes; 0: no limit."""
        return self._own_bytes.get(owner, self._default_bytes)

    def same(self, owner: bytes) -> tuple[bytes, ...]:
        """All owners in the index that are the same tenant."""
        return self._same.get(owner, (owner,))

    def over(
        self, space: Space, index: Index, drafts: Sequence[Draft], keep: Collection[RecordName]
    ) -> dict[bytes, Refusal]:
        """Evict within the quotas of the owners that write. Returns the owners for whom evicting was not enough, and
        why.
        """
        if not self._default_bytes and not self._own_bytes:
            return {}
        needed: dict[bytes, int] = defaultdict(int)
        for draft in drafts:
            needed[draft.header.owner] += draft.header.extent_bytes
        refused = {}
        for owner, nbytes in needed.items():
            quota = self.bytes_of(owner)
            if not quota:
                continue
            same = self.same(owner)
            excess = _used_bytes(index, same) + nbytes - quota
            if excess > 0:
                space.evict(excess, keep, owners=same)
            if _used_bytes(index, same) + nbytes > quota:
                text = f"the quota of tenant {owner[1:].hex()}, {quota} bytes, is used up"
                refused[owner] = Refusal(RefusalReason.QUOTA, text)
        return refused


def _used_bytes(index: Index, owners: Sequence[bytes]) -> int:
    with index.txn() as txn:
        totals = read_totals(index, txn)
        numbers = [index.owner_id(txn, owner) for owner in owners]
    keys = [b"t" + number.to_bytes(4, "little") for number in numbers if number is not None]
    return sum(totals.get(key, (0, 0, 0))[1] for key in keys)
