"""Reads an LMDB file with `pread` instead of a memory map: if the file is truncated, a read fails instead of ending the
process.

LMDB never overwrites a page of its newest state or of the state before (it reuses pages freed two commits ago). So a
reader needs neither a lock nor an entry in LMDB's reader table. A read starts from a meta page and checks afterwards
that this meta page is unchanged; the second commit after it overwrites exactly this page. If the meta page is
unchanged, all pages that were reached from it are still valid. If the meta page has changed, the read is repeated on
the newest state.

    meta     at page 0 and 1: page header 16 | magic u32 | version u32 | address u64 | map size u64 | table of free
             pages 48, whose first u32 is the size of a page | main table 48 | last page u64 | transaction u64
    table    pad u32 | flags u16 | depth u16 | branch, leaf and overflow pages, entries u64 each | root u64
    page     number u64 | pad u16 | flags u16 | end of the pointers u16 | begin of the nodes u16 | pointers u16 each
    node     low u16 | high u16 | flags u16 | key bytes u16 | key | value; in a branch the first three are the child's
             page number, in a leaf the first two are the value's length

Source: data version 1 of LMDB 0.9 (mdb.c); `lmdb.verify` reads the same format. Knows nothing about the store's tables.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from antefix.errors import Unavailable
from antefix.own_files import open_to_read

_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1
_META_OFFSET: Final = 16
_META: Final = struct.Struct("<IIQQ48s48sQQ")
_TABLE: Final = struct.Struct("<IHHQQQQQ")
_PAGE: Final = struct.Struct("<QHHH")
_NODE: Final = struct.Struct("<HHHH")
_HEADER_BYTES: Final = 16
_NODE_BYTES: Final = _NODE.size
_BRANCH: Final = 1
_LEAF: Final = 2
_OVERFLOW: Final = 4
_BIG: Final = 1
_SUBTABLE: Final = 2
_NO_ROOT: Final = 2**64 - 1
# LMDB's own limit of a tree's depth (CURSOR_STACK): in a damaged file, a path down the tree could be endless.
_DEPTH_MAX: Final = 32
_PAGE_BYTES: Final = (1 << 12, 1 << 16)
# How many branch pages are cached: 2,048 lead to about 200,000 leaves, the blocks of 100 GB of V4's KV. Further branch
# pages are read each time.
_BRANCHES_MAX: Final = 2048
# How often a read is repeated. A read takes microseconds and two commits take milliseconds, so more will not help.
_TRIES: Final = 64

# The main table, which holds the named tables, or the data itself in a file without named tables.
MAIN_TABLE: Final = ""

Branch = tuple[list[bytes], list[int]]


class Tree(NamedTuple):
    """The B-tree of a table: its root page, its depth in pages, and its number of keys."""

    page: int
    depth: int
    num_entries: int


class Damaged(Exception):
    """A page is not of the kind that its parent names: the file is damaged, or LMDB has reused the page."""


@dataclass(slots=True)
class _State:
    """One committed state, from one of the two meta pages. All readers of a state share this object, which only
    grows.
    """

    slot: int
    raw: bytes
    transaction: int
    main: Tree
    tables: dict[str, Tree] = field(default_factory=dict)
    branches: dict[int, Branch] = field(default_factory=dict)


class PageFile:
    """An open LMDB file. The object is thread-safe, because only the reference to the last seen state changes."""

    def __init__(self, path: Path) -> None:
        """Raises:  Unavailable: there is no file, or it does not begin like an LMDB file."""
        self.path = path
        try:
            self._fd = open_to_read(path)
        except OSError as err:
            raise Unavailable(f"the store's index cannot be opened in {path.parent}: {err}") from err
        # Close the descriptor with its last user, because other threads may still be reading.
        self._closing = weakref.finalize(self, os.close, self._fd)
        stat = os.fstat(self._fd)
        self.identity = stat.st_dev, stat.st_ino
        self._branches: dict[int, tuple[bytes, Branch]] = {}
        try:
            self.page_bytes = self._size_of_page()
            self._state = self.newest(None)
        except Unavailable:
            self.close()
            raise

    def close(self) -> None:
        self._closing()

    def _size_of_page(self) -> int:
        head = self._read(_META.size + _META_OFFSET, 0)
        try:
            free = _META.unpack_from(head, _META_OFFSET)[4]
            (size,) = struct.unpack_from("<I", free)
        except struct.error:
            size = 0
        if not _PAGE_BYTES[0] <= size <= _PAGE_BYTES[1] or size & (size - 1):
            raise Unavailable(f"the index in {self.path.parent} cannot be read: its first page is not a page of LMDB")
        return int(size)

    def _read(self, nbytes: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, nbytes, offset)
        except OSError as err:
            raise Unavailable(f"the index in {self.path.parent} cannot be read: {err}") from err

    def newest(self, known: _State | None) -> _State:
        """The newest committed state. The newest committed state; if nothing was committed since `known`, the result is
        `known` itself, with its cached pages.
        """
        data = self._read(self.page_bytes + _META_OFFSET + _META.size, 0)
        found: _State | None = None
        for slot in (0, 1):
            at = slot * self.page_bytes + _META_OFFSET
            raw = data[at : at + _META.size]
            if len(raw) < _META.size:
                continue
            magic, version, _, _, _, main, _, transaction = _META.unpack(raw)
            if (magic, version) == (_MAGIC, _VERSION) and (found is None or transaction > found.transaction):
                with contextlib.suppress(Damaged):
                    found = _State(slot, raw, transaction, tree_of(main))
        if found is None:
            raise Unavailable(f"the index in {self.path.parent} cannot be read: neither of its meta pages is valid")
        return known if known is not None and known.raw == found.raw and known.slot == found.slot else found

    def current(self) -> _State:
        state = self._state = self.newest(self._state)
        return state

    def holds(self, state: _State) -> bool:
        """Whether all pages that were read of this state so far are valid."""
        at = state.slot * self.page_bytes + _META_OFFSET
        return self._read(_META.size, at) == state.raw

    @property
    def is_replaced(self) -> bool:
        """Whether the file's path now leads to another file, or to none."""
        try:
            stat = self.path.stat()
        except OSError:
            return True
        return (stat.st_dev, stat.st_ino) != self.identity

    @property
    def is_whole(self) -> bool:
        """Whether the file has the length that its newest state requires."""
        try:
            last_page = _META.unpack(self.current().raw)[6]
        except Unavailable:
            return False
        return os.fstat(self._fd).st_size >= (int(last_page) + 1) * self.page_bytes

    def page(self, number: int, flag: int, count: int = 1) -> bytes:
        data = self._read(count * self.page_bytes, number * self.page_bytes)
        if len(data) < count * self.page_bytes:
            raise Damaged(f"page {number} lies behind the end of the file")
        named, _, flags, _ = _PAGE.unpack_from(data)
        if named != number or not flags & flag:
            raise Damaged(f"page {number} is not what it should be")
        return data

    def branch(self, state: _State, number: int) -> Branch:
        branch = state.branches.get(number)
        if branch is None:
            page = self.page(number, _BRANCH)
            # A commit changes few pages. Comparing a page with its cached copy is cheaper than parsing it.
            known = self._branches.get(number)
            branch = known[1] if known is not None and known[0] == page else branch_of(page)
            if len(self._branches) >= _BRANCHES_MAX:
                self._branches.clear()
            self._branches[number] = page, branch
            if len(state.branches) < _BRANCHES_MAX:
                state.branches[number] = branch
        return branch

    def leaf(self, state: _State, root: Tree, key: bytes) -> tuple[bytes, bytes | None]:
        """The leaf that would hold the key, and the first key of the next leaf; None: this is the last leaf."""
        number = root.page
        if number == _NO_ROOT:
            return b"", None
        end: bytes | None = None
        for _ in range(root.depth - 1):
            keys, children = self.branch(state, number)
            at = bisect_right(keys, key)
            if at < len(keys):
                end = keys[at]
            number = children[at]
        return self.page(number, _LEAF), end

    def value(self, page: bytes, at: int) -> bytes:
        """The value of the node at this offset of a leaf."""
        low, high, flags, key_bytes = _NODE.unpack_from(page, at)
        nbytes, begin = low | high << 16, at + _NODE_BYTES + key_bytes
        if not flags & _BIG:
            return page[begin : begin + nbytes]
        (number,) = struct.unpack_from("<Q", page, begin)
        count = -(-(_HEADER_BYTES + nbytes) // self.page_bytes)
        return self.page(number, _OVERFLOW, count)[_HEADER_BYTES : _HEADER_BYTES + nbytes]

    def find(self, state: _State, root: Tree, key: bytes) -> bytes | None:
        page, _ = self.leaf(state, root, key)
        if not page:
            return None
        # The key's bytes may also occur in a value, or in the remains of a deleted node.
        at = page.find(key, _HEADER_BYTES)
        while at >= 0:
            place = at - _NODE_BYTES
            if _is_node(page, place) and _NODE.unpack_from(page, place)[3] == len(key):
                return self.value(page, place)
            at = page.find(key, at + 1)
        return None

    def find_all(self, state: _State, root: Tree, keys: Sequence[bytes]) -> list[bytes | None]:
        """As `find`, for many keys. The look-up walks down the tree without a call per page, in a third less time."""
        if root.page == _NO_ROOT:
            return [None] * len(keys)
        known, below, nbytes = state.branches, range(root.depth - 1), self.page_bytes
        found: list[bytes | None] = []
        for key in keys:
            number = root.page
            for _ in below:
                begins, children = known.get(number) or self.branch(state, number)
                number = children[bisect_right(begins, key)]
            page = self._read(nbytes, number * nbytes)
            at = page.find(key, _HEADER_BYTES)
            if len(page) < nbytes or _PAGE.unpack_from(page)[::2] != (number, _LEAF) or at < 0:
                found.append(self.find(state, root, key))
                continue
            place = at - _NODE_BYTES
            low, high, flags, key_bytes = _NODE.unpack_from(page, place)
            if flags or key_bytes != len(key) or not _is_node(page, place):
                found.append(self.find(state, root, key))
                continue
            begin = at + key_bytes
            found.append(page[begin : begin + (low | high << 16)])
        return found

    def table(self, state: _State, name: str) -> Tree:
        root = state.tables.get(name) if name != MAIN_TABLE else state.main
        if root is None:
            value = self.find(state, state.main, name.encode())
            if value is None:
                raise Damaged(f"it has no table {name}")
            root = state.tables[name] = tree_of(value)
        return root


class PageTxn:
    """Reads an LMDB file like a transaction of `lmdb`. Each call reads one committed state; after two commits, the
    newest one.

    So several calls in a row may see different states, but never an older one after a newer one. No call ever sees an
    uncommitted state.
    """

    def __init__(self, file: PageFile) -> None:
        self._file = file
        self._state = file.current()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def get(self, key: bytes, *, db: str) -> bytes | None:
        """The value of a key.  Raises:  Unavailable: the file is truncated, damaged or deleted."""
        return self.read([key], db=db)[0]

    def stat(self, db: str) -> dict[str, int]:
        """The number of `entries` of a table."""
        file = self._file
        for _ in range(_TRIES):
            damage: Exception | None = None
            try:
                tree = file.table(self._state, db)
            except (Damaged, struct.error) as err:
                damage = err
            if self._is_right(damage):
                return {"entries": tree.num_entries}
        raise self._too_fast()

    def cursor(self, *, db: str) -> PageCursor:
        return PageCursor(self, db)

    def read(self, keys: Sequence[bytes], *, db: str) -> list[bytes | None]:
        """The values of several keys; None for each key that is not in the table.  Raises:  Unavailable: as `get`."""
        file = self._file
        for _ in range(_TRIES):
            state, damage = self._state, None
            try:
                root = file.table(state, db)
                found = file.find_all(state, root, keys)
            except (Damaged, struct.error) as err:
                damage = err
            if self._is_right(damage):
                return found
        raise self._too_fast()

    def leaf(self, key: bytes, *, db: str, values: bool) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
        """Keys and values (empty unless `values`) from this key on in its leaf, and the first key of the next leaf."""
        file = self._file
        for _ in range(_TRIES):
            state, damage = self._state, None
            try:
                page, end = file.leaf(state, file.table(state, db), key)
                found = [item for item in _items(file, page, values) if item[0] >= key]
            except (Damaged, struct.error) as err:
                damage = err
            if self._is_right(damage):
                return found, end
        raise self._too_fast()

    def _is_right(self, damage: Exception | None) -> bool:
        """Whether the pages that were just read are valid. If the pages are not valid, the reader switches to the
        newest state.

        Raises:  Unavailable: the state has not changed, so the file is damaged.
        """
        file = self._file
        if file.holds(self._state):
            if damage is not None:
                raise Unavailable(f"the index in {file.path.parent} cannot be read, see `antefix fsck`: {damage}")
            return True
        self._state = file.current()
        return False

    def _too_fast(self) -> Unavailable:
        return Unavailable(f"the index in {self._file.path.parent} changes faster than it can be read")


class PageCursor:
    """The part of LMDB's cursor interface that readers use."""

    def __init__(self, txn: PageTxn, db: str) -> None:
        self._txn = txn
        self._db = db

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values in the order of keys. A commit during the iteration affects only the keys that follow."""
        return self._items(values=True)

    def iternext(self, *, keys: bool = True, values: bool = True) -> Iterator[Any]:
        """As LMDB's `iternext`: pairs, or only keys, or only values."""
        if keys and values:
            return iter(self)
        return (key if keys else value for key, value in self._items(values=values))

    def starting(self, first: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values from this key on."""
        return self._items(values=True, begin=first)

    def _items(self, *, values: bool, begin: bytes | None = b"") -> Iterator[tuple[bytes, bytes]]:
        while begin is not None:
            found, begin = self._txn.leaf(begin, db=self._db, values=values)
            yield from found

    def getmulti(self, keys: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
        """The keys that exist, with their values."""
        wanted = list(keys)
        found = self._txn.read(wanted, db=self._db)
        return [(key, value) for key, value in zip(wanted, found, strict=True) if value is not None]


def tree_of(table: bytes) -> Tree:
    if len(table) != _TABLE.size:
        raise Damaged("a table's description has another length")
    _, _, depth, _, _, _, num_entries, root = _TABLE.unpack(table)
    if depth > _DEPTH_MAX or (depth == 0 and root != _NO_ROOT):
        raise Damaged("a table is deeper than LMDB makes them")
    return Tree(root, depth, num_entries)


@functools.cache
def _pointers_of(lower: int) -> struct.Struct:
    if lower < _HEADER_BYTES:
        raise Damaged("a page has a negative number of nodes")
    return struct.Struct(f"<{(lower - _HEADER_BYTES) // 2}H")


def _is_node(page: bytes, place: int) -> bool:
    """Whether a node begins at this offset. Searching for the node's pointer takes a fifth of the time of parsing the
    page.
    """
    end, pointer = _PAGE.unpack_from(page)[3], place.to_bytes(2, "little")
    at = page.find(pointer, _HEADER_BYTES, end)
    while at >= 0 and at % 2:
        at = page.find(pointer, at + 1, end)
    return at >= 0


def _pointers(page: bytes) -> tuple[int, ...]:
    """The offsets of all nodes on the page."""
    return _pointers_of(_PAGE.unpack_from(page)[3]).unpack_from(page, _HEADER_BYTES)


def branch_of(page: bytes) -> Branch:
    keys, children = [], []
    for at in _pointers(page):
        low, high, higher, nbytes = _NODE.unpack_from(page, at)
        keys.append(page[at + _NODE_BYTES : at + _NODE_BYTES + nbytes])
        children.append(low | high << 16 | higher << 32)
    if not children:
        raise Damaged("a branch page has no children")
    # LMDB ignores the first key of a branch page.
    return keys[1:], children


def _items(file: PageFile, page: bytes, values: bool) -> Iterator[tuple[bytes, bytes]]:
    for at in _pointers(page) if page else ():
        nbytes = _NODE.unpack_from(page, at)[3]
        yield page[at + _NODE_BYTES : at + _NODE_BYTES + nbytes], file.value(page, at) if values else b""
