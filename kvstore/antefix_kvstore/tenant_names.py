"""Tenants' names and numbers in the index: given with a tenant's first record, forgotten with its last.

With one cache tenant for each end user there are as many names as users, so what is kept must follow what is stored. A
number is never given twice in the life of an index: an entry, snapshot or reader that still has it can only find that
it means nobody any more, never that it means somebody else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from antefix.errors import StoreFull
from antefix.store_files.index import Index

_NUMBER_MAX: Final = 0xFFFFFFFF


class TenantNames:
    """The tenants of one write transaction."""

    def __init__(self, index: Index, txn: Any) -> None:
        self._index = index
        self._txn = txn
        # Every record names its tenant, and in one transaction they are few.
        self._numbers: dict[str, int] = {}
        self._given: set[int] = set()

    def find(self, tenant: str) -> int | None:
        """The number of a tenant that has something stored, or just got one."""
        number = self._numbers.get(tenant)
        return self._index.tenant_id(self._txn, tenant) if number is None else number

    def number(self, tenant: str) -> int:
        """The number of a tenant of which a record is about to be indexed; a new one where it has none.

        Raises:  StoreFull: see `next_number`.
        """
        if tenant not in self._numbers:
            found = self._index.tenant_id(self._txn, tenant)
            self._numbers[tenant] = self._give(tenant) if found is None else found
        return self._numbers[tenant]

    def _give(self, tenant: str) -> int:
        number = next_number(self._index, self._txn, b"T")
        key, names = number.to_bytes(4, "little"), self._index.db["names"]
        self._txn.put(b"t" + tenant.encode(), key, db=names)
        self._txn.put(b"T" + key, tenant.encode(), db=names)
        self._given.add(number)
        return number

    def forget_empty(self, changed: Iterable[int]) -> None:
        """Drop the names of which nothing is stored, among those in `changed` and those given in this transaction.

        To be called when the totals are written: they say what is stored.
        """
        names, totals = self._index.db["names"], self._index.db["totals"]
        for number in {*changed, *self._given}:
            key = number.to_bytes(4, "little")
            if any(self._txn.get(b"t" + key, db=totals) or b""):
                continue
            self._txn.delete(b"t" + key, db=totals)
            tenant = self._txn.pop(b"T" + key, db=names)
            if tenant is not None:
                self._txn.delete(b"t" + tenant, db=names)

    def forget_all_empty(self) -> None:
        """The same for all: stores of earlier versions hold the name of everyone who ever stored something."""
        self.forget_empty(self._index.tenants(self._txn))


def next_number(index: Index, txn: Any, prefix: bytes) -> int:
    """A number that was never given before in this index.

    Raises:  StoreFull: all four billion were given; a rebuilt index begins again at 1.
    """
    key, names = b"#" + prefix, index.db["names"]
    value = txn.get(key, db=names)
    number = 1 + (0 if value is None else int.from_bytes(value, "little"))
    if number > _NUMBER_MAX:
        raise StoreFull(
            f"the index has given out all its numbers: stop the service and delete {index.directory}, which is then"
            " rebuilt from the segments"
        )
    txn.put(key, number.to_bytes(4, "little"), db=names)
    return number
