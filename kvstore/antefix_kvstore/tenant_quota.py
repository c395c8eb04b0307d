"""What one tenant may take of the store. Over its quota its own least valuable leaves make room, never others'."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from antefix.store_files.index import Index
from antefix_kvstore.index_writer import Name, read_totals
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.segments import Draft
from antefix_kvstore.space import Space


def over_quota(
    space: Space, index: Index, config: KvStoreConfig, drafts: Sequence[Draft], keep: Collection[Name]
) -> dict[str, str]:
    """Make room inside the quotas of the tenants that write; returns those for which that failed, and why."""
    if not config.has_quotas:
        return {}
    needed: dict[str, int] = defaultdict(int)
    for draft in drafts:
        needed[draft.header.tenant] += draft.header.extent_bytes
    refused = {}
    for tenant, nbytes in needed.items():
        quota = config.quota_bytes(tenant)
        if not quota:
            continue
        excess = _used_bytes(index, tenant) + nbytes - quota
        if excess > 0:
            space.evict(excess, keep, tenant=tenant)
        if _used_bytes(index, tenant) + nbytes > quota:
            refused[tenant] = f"the quota of tenant {tenant!r}, {quota} bytes, is used up"
    return refused


def _used_bytes(index: Index, tenant: str) -> int:
    with index.txn() as txn:
        number = index.tenant_id(txn, tenant)
        return 0 if number is None else read_totals(index, txn).get(b"t" + number.to_bytes(4, "little"), (0, 0, 0))[1]
