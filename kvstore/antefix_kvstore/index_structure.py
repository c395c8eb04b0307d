"""Checks the structure of an LMDB file before LMDB opens it, because LMDB trusts what it maps.

The file is read with `pread`, never through a memory map. Walks every tree from the newest meta page, many pages at a
time with numpy, because a store of a million blocks has tens of thousands of leaves. Each batch of leaf pages is passed
to the caller (`LeafBatch`), so the file is read only once. The memory that the check needs grows only by one byte per
page.

The check is stricter than LMDB: duplicates, reserved flags and gaps, which our own writer never makes, are faults. The
page format is in `antefix.store_files.index_pages`. `lmdb.verify` checks the same page by page; tests compare with it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from antefix.own_files import open_to_read
from antefix.store_files.index_pages import Damaged, tree_of
from antefix_kvstore.index_leaves import Fault, LeafBatch, read_branches, read_leaves

_META: Final = struct.Struct("<QHHIIIQQ48s48sQQ")
_TABLE: Final = struct.Struct("<IHHQQQQQ")
_MAGIC: Final = 0xBEEFC0DE
_P_OVERFLOW: Final = 4
_P_META: Final = 8
# The tree of free pages has transaction numbers as keys, compared as integers.
_INTEGER_KEYS: Final = 8
_NO_ROOT: Final = 2**64 - 1
_NUM_METAS: Final = 2
_DEPTH_MAX: Final = 32
_BATCH_PAGES: Final = 1024
# Each has up to about a hundred children.
_BATCH_BRANCHES: Final = 16
_FREE, _LIVE = 1, 2

Leaves = Callable[[str, LeafBatch], None]


@dataclass(slots=True)
class _Tree:
    flags: int
    depth: int
    num_branches: int
    num_leaves: int
    num_overflows: int
    num_entries: int
    root: int
    found: dict[str, int] = field(default_factory=lambda: {"branches": 0, "leaves": 0, "overflows": 0, "entries": 0})

    @classmethod
    def of(cls, raw: bytes) -> _Tree:
        if len(raw) != _TABLE.size:
            raise Fault("a table's description has another length")
        tree_of(raw)
        _, *numbers = _TABLE.unpack(raw)
        return cls(*numbers)


def structure_fault(path: Path, tables: Sequence[str], leaves: Leaves) -> str | None:
    """What is wrong with the index file; None if nothing is.

    tables: names of the tables that the file may have.  leaves: called with each batch of a table's leaf pages, in
    order.
    """
    try:
        with os.fdopen(open_to_read(path), "rb") as file:
            _Walk(file.fileno(), tables, leaves).run()
    except (Fault, Damaged, struct.error, OSError, ValueError, IndexError, OverflowError) as err:
        return str(err) or type(err).__name__
    return None


class _Walk:
    def __init__(self, fd: int, tables: Sequence[str], leaves: Leaves) -> None:
        self._fd = fd
        self._names = tables
        self._leaves = leaves

    def run(self) -> None:
        free, main = self._begin()
        named: dict[str, _Tree] = {}
        for batch in self._walk(main):
            for key, value in batch.items():
                if key.decode("ascii", "replace") not in self._names:
                    raise Fault("it has a table that no store has")
                named[key.decode()] = _Tree.of(value)
        for name, tree in named.items():
            if tree.flags:
                raise Fault(f"its table {name} has another order")
            for batch in self._walk(tree):
                self._leaves(name, batch)
        for batch in self._walk(free):
            for _, value in batch.items():
                self._note_free(value)
        # Pages 0 and 1 are the meta pages.
        if not self._pages[_NUM_METAS:].all():
            raise Fault("it has pages that are neither used nor free")

    def _begin(self) -> tuple[_Tree, _Tree]:
        """Read both meta pages and use the newer one, as LMDB does."""
        self._page_bytes = 1 << 12
        head = self._read(_META.size, 0)
        (self._page_bytes,) = struct.unpack_from("<I", head, 40)
        if self._page_bytes not in (1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16):
            raise Fault("its first page is not LMDB's")
        metas = [_META.unpack(self._read(_META.size, slot * self._page_bytes)) for slot in range(_NUM_METAS)]
        for slot, (number, _, flags, _, magic, version, *_) in enumerate(metas):
            if (number, flags, magic, version) != (slot, _P_META, _MAGIC, 1):
                raise Fault("a meta page is not LMDB's")
        newest = metas[metas[0][-1] < metas[1][-1]]
        free, main, last_page = _Tree.of(newest[8]), _Tree.of(newest[9]), newest[10]
        if (last_page + 1) * self._page_bytes > os.fstat(self._fd).st_size:
            raise Fault("it is shorter than it says")
        if free.flags & 0xFFFF != _INTEGER_KEYS or main.flags:
            raise Fault("its trees have another order")
        self._pages = np.zeros(last_page + 1, np.uint8)
        return free, main

    def _read(self, nbytes: int, offset: int) -> bytes:
        data = os.pread(self._fd, nbytes, offset)
        if len(data) < nbytes:
            raise Fault("it is shorter than it says")
        return data

    def _note(self, pages: npt.NDArray[np.int64] | Sequence[int], as_what: int) -> None:
        """Mark pages as used. Each page must be used exactly once, or be free."""
        numbers = np.asarray(pages, np.int64)
        if not numbers.size:
            return
        if int(numbers.min()) < _NUM_METAS or int(numbers.max()) >= len(self._pages):
            raise Fault("it leads outside the file")
        if self._pages[numbers].any() or len(np.unique(numbers)) < len(numbers):
            raise Fault("a page is used twice")
        self._pages[numbers] = as_what

    def _note_free(self, value: bytes) -> None:
        numbers = np.frombuffer(value, np.uint64)
        if not len(numbers) or int(numbers[0]) != len(numbers) - 1 or int(numbers.max()) >= len(self._pages):
            raise Fault("its list of free pages is damaged")
        self._note(numbers[1:].astype(np.int64), _FREE)

    def _walk(self, tree: _Tree) -> Iterator[LeafBatch]:
        """The leaf pages of a tree in order; each is checked by itself, against the others and against the branches
        above them.
        """
        found = tree.found
        if tree.root != _NO_ROOT:
            if not 1 <= tree.depth <= _DEPTH_MAX:
                raise Fault("a tree is too deep")
            last = b""
            is_ordered_by_bytes = not tree.flags
            for pages, lows in self._batches(self._leaf_pages([tree.root], [b""], tree.depth, tree)):
                batch = read_leaves(self._fd, self._page_bytes, pages, self._overflow)
                self._note(pages, _LIVE)
                if is_ordered_by_bytes:
                    last = batch.check_order(lows, last)
                found["leaves"] += len(pages)
                found["entries"] += batch.num_nodes
                found["overflows"] += batch.num_overflows
                yield batch
        said = (tree.num_branches, tree.num_leaves, tree.num_overflows, tree.num_entries)
        if said != tuple(found[name] for name in ("branches", "leaves", "overflows", "entries")):
            raise Fault("a tree counts its pages wrongly")

    def _batches(
        self, groups: Iterator[tuple[Sequence[int], Sequence[bytes]]]
    ) -> Iterator[tuple[list[int], list[bytes]]]:
        pages: list[int] = []
        lows: list[bytes] = []
        for more_pages, more_lows in groups:
            pages += more_pages
            lows += more_lows
            if len(pages) >= _BATCH_PAGES:
                yield pages, lows
                pages, lows = [], []
        if pages:
            yield pages, lows

    def _leaf_pages(
        self, pages: Sequence[int], lows: Sequence[bytes], depth: int, tree: _Tree
    ) -> Iterator[tuple[Sequence[int], Sequence[bytes]]]:
        """Page numbers of the leaves under these pages, in order, and the lower bound of each leaf's keys.

        pages: neighbours at the same depth.  lows: the lower bound of each page's keys.
        """
        if depth == 1:
            yield pages, lows
            return
        for first in range(0, len(pages), _BATCH_BRANCHES):
            some = pages[first : first + _BATCH_BRANCHES]
            self._note(some, _LIVE)
            tree.found["branches"] += len(some)
            children, bounds = read_branches(self._fd, self._page_bytes, some, lows[first : first + len(some)])
            yield from self._leaf_pages(children, bounds, depth - 1, tree)

    def _overflow(self, number: int, nbytes: int) -> bytes:
        """Read a large value from its overflow pages."""
        count = -(-(16 + nbytes) // self._page_bytes)
        self._note(np.arange(number, number + count), _LIVE)
        data = self._read(count * self._page_bytes, number * self._page_bytes)
        named, _, flags, said = struct.unpack_from("<QHHI", data)
        if named != number or flags != _P_OVERFLOW or said != count:
            raise Fault(f"page {number} holds no large value")
        return data[16 : 16 + nbytes]
