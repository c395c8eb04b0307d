"""Several stores and an object store as one store. Each of these stores has some of the records, so every restore reads
from all of them.

Records are read in the same way as workers read them (`antefix.store.many_stores`). Writes differ: a record's hash
decides where it goes, and a record for the object store is there when the put returns, not some seconds later.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from antefix.layout import PayloadLayout
from antefix.objects.bucket import Bucket, open_bucket, scheme_of
from antefix.objects.object_tier import ObjectTier
from antefix.objects.object_writer import ObjectSettings, ObjectWriter
from antefix.record import MEMORY_KINDS, PutResult, Record, RecordKind
from antefix.store.many_stores import ManyStores
from antefix.store.read_tiers import PrefixRead
from antefix.store.store_members import Member
from antefix.store.tier import Tier
from antefix.store_files import codec
from antefix.tier_kind import TierKind

# A failed run may leave objects below this folder in the bucket.
_FOLDER: Final = "antefix-verify"


class SpreadStores(ManyStores):
    """num_blocks_read: blocks read from each tier, by the tier's label."""

    def __init__(self, members: Sequence[Member], object_store: str = "") -> None:
        """object_store: a URL. Only a folder below this URL is used, and it is deleted at the end. Empty: no object
        store.

        Raises:  ConfigError: the URL cannot be used.
        """
        self.num_blocks_read: Counter[str] = Counter()
        self._plans: dict[tuple[bytes, RecordKind], codec.PlanePlan] = {}
        self._writer: ObjectWriter | None = None
        tiers = []
        if object_store:
            scheme = scheme_of(object_store)
            source = ObjectTier(open_bucket(f"{object_store.rstrip('/')}/{_FOLDER}-{secrets.token_hex(8)}"))
            settings = ObjectSettings(plans=lambda: self._plans)
            self._writer = ObjectWriter(source.catalog, settings)
            tiers.append(Tier(scheme, TierKind.OBJECT, source))
        super().__init__(members, more=tiers)

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        self._plans[fingerprint, RecordKind.BLOCK] = codec.plan_of_block(layout)
        self._plans[fingerprint, RecordKind.CHECKPOINT] = codec.plan_of_checkpoint(layout)
        await super().register(fingerprint, layout, statement=statement)

    async def put(self, records: Sequence[Record]) -> PutResult:
        kept = [record for record in records if record.kind in MEMORY_KINDS]
        results = [await super().put(kept)] if kept else []
        parts: dict[int, list[Record]] = {}
        for record in records:
            if record.kind not in MEMORY_KINDS:
                home = int.from_bytes(record.hash[:4], "little") % len(self.members.tiers)
                parts.setdefault(home, []).append(replace(record, parent_elsewhere=True))
        for home, part in parts.items():
            stores = self.members.stores
            results.append(await (stores[home].store.put(part) if home < len(stores) else self._upload(part)))
        refused = {name: why for result in results for name, why in result.refused.items()}
        return PutResult(
            num_stored=sum(result.num_stored for result in results),
            num_existing=sum(result.num_existing for result in results),
            refused=refused,
        )

    async def read_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> PrefixRead:
        found = await super().read_blocks(hashes, into, fingerprint=fingerprint, tenant=tenant)
        for each in found.reads:
            self.num_blocks_read[each.tier] += each.num_blocks
        return found

    async def close(self) -> None:
        if self._writer is not None:
            await _delete_all(self._writer.catalog.bucket)
        await super().close()

    async def _upload(self, records: Sequence[Record]) -> PutResult:
        assert self._writer is not None
        by_kind: Mapping[RecordKind, list[Record]] = {kind: [] for kind in RecordKind}
        for record in records:
            by_kind[record.kind].append(record)
        new: list[Record] = []
        for kind, part in by_kind.items():
            places = self._writer.catalog.find(kind, [record.hash for record in part])
            new += [record for record, place in zip(part, places, strict=True) if place is None]
        await self._writer.write(new)
        return PutResult(num_stored=len(new), num_existing=len(records) - len(new))


async def _delete_all(bucket: Bucket) -> None:
    for folder in ("segments/", "index/"):
        await bucket.delete([each.name for each in await bucket.list_objects(folder)])
