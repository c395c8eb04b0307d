"""Owners' numbers in the index: assigned with an owner's first record, forgotten when the last record goes.

Where each end user is an owner, there are as many owners as users, so only owners with stored records are kept. A
number is never assigned twice in the life of an index. An entry, snapshot or reader that still has an old number finds
no owner for it, and never another owner.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from antefix.errors import StoreFull
from antefix.store_files.index import GENERATION_BYTES, Index, owner_of

_NUMBER_MAX: Final = 0xFFFFFFFF


class OwnerNumbers:
    """The owners seen by one write transaction, as `antefix.store_files.record_header.owner_row` encodes them."""

    def __init__(self, index: Index, txn: Any) -> None:
        self._index = index
        self._txn = txn
        # Every record names its owner, and the owners of one transaction are few, so they are kept here.
        self._numbers: dict[bytes, int] = {}
        self._given: set[int] = set()

    def find(self, owner: bytes) -> int | None:
        """The number of an owner that has stored records, or got a number in this transaction."""
        number = self._numbers.get(owner)
        return self._index.owner_id(self._txn, owner) if number is None else number

    def number(self, owner: bytes, generation: int) -> int:
        """The number of the owner of a record that is about to be indexed; a new number if the owner has none.

        generation: the generation of the secret that made the owner's digest.
        Raises:  StoreFull: see `next_number`.
        """
        if owner not in self._numbers:
            found = self._index.owner_id(self._txn, owner)
            self._numbers[owner] = self._give(owner, generation) if found is None else found
        return self._numbers[owner]

    def _give(self, owner: bytes, generation: int) -> int:
        number = next_number(self._index, self._txn, b"T")
        key, names = number.to_bytes(4, "little"), self._index.db["names"]
        self._txn.put(owner, key, db=names)
        # An owner of version 1 is a plain name, made without a secret.
        made_by = generation.to_bytes(GENERATION_BYTES, "little") if owner[:1] == b"o" else b""
        self._txn.put(owner[:1].upper() + key, owner[1:] + made_by, db=names)
        self._given.add(number)
        return number

    def forget_empty(self, changed: Iterable[int]) -> None:
        """Drop the owners that have no stored records, among those in `changed` and those added by this transaction.

        This method must be called when the totals are written, because the totals tell which owners have records.
        """
        names, totals = self._index.db["names"], self._index.db["totals"]
        for number in {*changed, *self._given}:
            key = number.to_bytes(4, "little")
            if any(self._txn.get(b"t" + key, db=totals) or b""):
                continue
            self._txn.delete(b"t" + key, db=totals)
            for letter in (b"t", b"o"):
                value = self._txn.pop(letter.upper() + key, db=names)
                if value is not None:
                    self._txn.delete(owner_of(letter, value), db=names)

    def forget_all_empty(self) -> None:
        """`forget_empty` for all owners: stores of earlier versions kept the name of every owner that ever stored
        something.
        """
        self.forget_empty(self._index.owners(self._txn))


def next_number(index: Index, txn: Any, prefix: bytes) -> int:
    """A number that this index has never assigned before.

    Raises:  StoreFull: all four billion numbers were assigned; a rebuilt index begins at 1 again.
    """
    key, names = b"#" + prefix, index.db["names"]
    value = txn.get(key, db=names)
    number = 1 + (0 if value is None else int.from_bytes(value, "little"))
    if number > _NUMBER_MAX:
        raise StoreFull(
            f"the store's index has given out all its numbers: stop the service and delete {index.directory}; "
            "the index is then rebuilt from the segments"
        )
    txn.put(key, number.to_bytes(4, "little"), db=names)
    return number
