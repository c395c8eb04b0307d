"""Reads many pages of an LMDB file at once as numpy arrays, and checks each by itself: leaves, and the branches above
them.

Letters:  P = pages of a batch, N = nodes on them, in the order of keys.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Overflow = Callable[[int, int], bytes]

_P_BRANCH: Final = 1
_P_LEAF: Final = 2
_BIG: Final = 1
_SUBTABLE: Final = 2
_HEADER_BYTES: Final = 16
_NODE_BYTES: Final = 8


class Fault(Exception):
    """The file does not have the form in which LMDB writes files. The message says where."""


@dataclass(frozen=True, slots=True)
class LeafBatch:
    """pages: [P, page bytes] uint8.  page_of, at: [N], each node's page in the batch and its offset in that page.

    key_bytes, value_bytes: [N].  big: values stored on overflow pages, by node.
    """

    pages: Array
    page_of: Array
    at: Array
    key_bytes: Array
    value_bytes: Array
    first_nodes: Array
    big: dict[int, bytes] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        return len(self.at)

    @property
    def num_overflows(self) -> int:
        return sum(-(-(_HEADER_BYTES + len(value)) // self.pages.shape[1]) for value in self.big.values())

    def gather(self, nodes: Array, begin: int | Array, nbytes: int) -> Array:
        """Shapes:  [len(nodes), nbytes] uint8: `nbytes` bytes of each node, from `begin` after the node's header."""
        flat = self.pages.reshape(-1)
        starts = self.page_of[nodes] * self.pages.shape[1] + self.at[nodes] + _NODE_BYTES + begin
        windows: Array = np.lib.stride_tricks.sliding_window_view(flat, nbytes)[starts]
        return windows

    def keys(self) -> list[bytes]:
        """The keys of all nodes."""
        keys = np.empty(self.num_nodes, object)
        for nbytes in distinct_of(self.key_bytes).tolist():
            nodes = np.flatnonzero(self.key_bytes == nbytes)
            keys[nodes] = self.gather(nodes, 0, nbytes).view(f"V{nbytes}")[:, 0].tolist() if nbytes else b""
        found: list[bytes] = keys.tolist()
        return found

    def key(self, node: int) -> bytes:
        begin = int(self.at[node]) + _NODE_BYTES
        return self.pages[self.page_of[node], begin : begin + int(self.key_bytes[node])].tobytes()

    def value(self, node: int) -> bytes:
        if node in self.big:
            return self.big[node]
        begin = int(self.at[node]) + _NODE_BYTES + int(self.key_bytes[node])
        return self.pages[self.page_of[node], begin : begin + int(self.value_bytes[node])].tobytes()

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        for node in range(self.num_nodes):
            yield self.key(node), self.value(node)

    def check_order(self, lows: Sequence[bytes], last: bytes) -> bytes:
        """Check that keys rise from node to node and page to page, and that each page's keys lie within its branch's
        bounds.

        lows: lower bound of each page.  last: the last key of the batch before.  Returns this batch's last key.
        Raises:  Fault.
        """
        longest = max(int(self.key_bytes.max()), *map(len, lows), len(last))
        width = -(-longest // 8) * 8 + 8
        bounds = _padded([last, *lows], width)
        begin, end = self._padded_keys(self.first_nodes, width), self._padded_keys(self.first_nodes[1:] - 1, width)
        # Most neighbours differ in the first eight bytes. Only the others are compared in full.
        words = self._first_words()
        near = np.flatnonzero(words[1:] == words[:-1])
        are_higher = [
            words[1:] >= words[:-1],
            _greater(self._padded_keys(near + 1, width), self._padded_keys(near, width)),
            ~_greater(bounds[1:], begin),
            # The last key of each page lies below the next page's bound.
            _greater(bounds[2:], end),
        ]
        if last:
            are_higher += [_greater(begin[:1], bounds[:1]), _greater(bounds[1:2], bounds[:1])]
        if not all(higher.all() for higher in are_higher):
            raise Fault("keys are not in order")
        return self.key(self.num_nodes - 1)

    def _first_words(self) -> Array:
        """The first eight bytes of each key as a number; 0 for all keys if one is shorter.  Shapes:  [N] uint64."""
        if (self.key_bytes < 8).any():
            return np.zeros(self.num_nodes, np.uint64)
        return self.gather(np.arange(self.num_nodes), 0, 8).view(">u8")[:, 0].astype(np.uint64)

    def _padded_keys(self, nodes: Array, width: int) -> Array:
        """The keys of these nodes, padded to one length as by `_padded`."""
        padded, sizes = np.zeros((len(nodes), width), np.uint8), self.key_bytes[nodes]
        for nbytes in distinct_of(sizes).tolist():
            alike = np.flatnonzero(sizes == nbytes)
            padded[alike, :nbytes] = self.gather(nodes[alike], 0, nbytes)
        padded[:, -1] = sizes & 0xFF
        return padded.view(">u8")


def distinct_of(numbers: Array) -> Array:
    """The distinct numbers, in order. Mostly all of them are equal, which is seen without sorting."""
    return numbers[:1] if (numbers[1:] == numbers[:-1]).all() else np.unique(numbers)


def _padded(keys: Sequence[bytes], width: int) -> Array:
    """Shapes:  [len(keys), W] big-endian u64 words: the key, zeros, then its length. These compare in the order of the
    keys.
    """
    rows, sizes = np.zeros((len(keys), width), np.uint8), np.fromiter(map(len, keys), np.int64, len(keys))
    for nbytes in distinct_of(sizes).tolist():
        alike = np.flatnonzero(sizes == nbytes)
        rows[alike, :nbytes] = np.frombuffer(b"".join([keys[at] for at in alike.tolist()]), np.uint8).reshape(
            len(alike), nbytes
        )
    rows[:, -1] = sizes & 0xFF
    return rows.view(">u8")


def _greater(ones: Array, others: Array) -> Array:
    """Shapes:  [N] bool: whether each row of words is greater than the other."""
    greater = np.zeros(len(ones), bool)
    equal = np.ones(len(ones), bool)
    for column in range(ones.shape[1]):
        one, other = ones[:, column], others[:, column]
        greater |= equal & (one > other)
        equal &= one == other
        if not equal.any():
            break
    return greater


def read_leaves(fd: int, page_bytes: int, numbers: Sequence[int], overflow: Overflow) -> LeafBatch:
    """Read the pages with these numbers, and check each page by itself.

    overflow: called with the first overflow page and the size of a large value; returns that value.
    Raises:  Fault: a page is no leaf, or its nodes lie outside it or overlap.
    """
    read = _read_nodes(fd, page_bytes, numbers, _P_LEAF)
    node, key_bytes = read.node, read.node[3]
    value_bytes, flags = node[0] | node[1] << 16, node[2]
    is_big = flags == _BIG
    read.check(key_bytes + np.where(is_big, 8, value_bytes))
    # A named table's record may be in the main tree only; its length identifies it there.
    if ((flags != 0) & ~is_big & (flags != _SUBTABLE)).any():
        raise Fault("a node is of an unknown kind")
    batch = LeafBatch(read.pages, read.page_of, read.at, key_bytes, value_bytes, read.first_nodes)
    for number in np.flatnonzero(is_big).tolist():
        start = batch.gather(np.array([number]), batch.key_bytes[[number]], 8)
        batch.big[number] = overflow(int(start.copy().view("<u8")[0, 0]), int(value_bytes[number]))
    return batch


def read_branches(
    fd: int, page_bytes: int, numbers: Sequence[int], lows: Sequence[bytes]
) -> tuple[list[int], list[bytes]]:
    """The pages under branches, in order, and the lower bound of each page's keys.

    lows: the lower bound of each branch's keys, which holds for its first page. LMDB ignores the first key of a branch.
    Raises:  Fault: as in `read_leaves`.
    """
    read = _read_nodes(fd, page_bytes, numbers, _P_BRANCH)
    low, high, higher, key_bytes = read.node
    read.check(key_bytes)
    batch = LeafBatch(read.pages, read.page_of, read.at, key_bytes, np.zeros_like(key_bytes), read.first_nodes)
    bounds = batch.keys()
    for first, bound in zip(read.first_nodes.tolist(), lows, strict=True):
        bounds[first] = bound
    return (low | high << 16 | higher << 32).tolist(), bounds


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The nodes of some pages.  node: [4, N], the words of each node's header; the others as in LeafBatch.

    upper: [P], where the nodes of each page begin.
    """

    pages: Array
    page_of: Array
    at: Array
    node: Array
    first_nodes: Array
    upper: Array

    def check(self, data_bytes: Array) -> None:
        """Check that the nodes of each page fill it from `upper` to its end without gaps, each at an even offset.

        data_bytes: [N], bytes after each node's header.  Raises:  Fault.
        """
        page_bytes = self.pages.shape[1]
        taken = _NODE_BYTES + data_bytes
        taken += taken % 2
        if (self.at + taken > page_bytes).any():
            raise Fault("a node lies outside its page")
        order = np.argsort(self.page_of * page_bytes + self.at, kind="stable")
        begin, stop, page = self.at[order], (self.at + taken)[order], self.page_of[order]
        is_last = np.append(page[1:] != page[:-1], True)
        follows = np.append(begin[1:], 0)
        is_first = np.append(True, is_last[:-1])
        whole = np.where(is_last, page_bytes, follows) == stop
        if not whole.all() or (begin[is_first] != self.upper[page[is_first]]).any():
            raise Fault("nodes lie over one another")


def _read_nodes(fd: int, page_bytes: int, numbers: Sequence[int], kind: int) -> _Nodes:
    """Raises:  Fault: a page is not of this kind, or a node begins outside it."""
    raw = bytearray(len(numbers) * page_bytes)
    view = memoryview(raw)
    # Pages that follow one another in the file are read together.
    begins = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    for begin, end in itertools.pairwise(begins):
        part, offset = view[begin * page_bytes : end * page_bytes], numbers[begin] * page_bytes
        # Some file systems give less at once than they have.
        while part:
            if not (nbytes := os.preadv(fd, [part], offset)):
                raise Fault("it is shorter than it says")
            part, offset = part[nbytes:], offset + nbytes
    pages = np.frombuffer(raw, np.uint8).reshape(len(numbers), page_bytes)
    halves = pages.view("<u2")
    lower, upper = halves[:, 6].astype(np.int64), halves[:, 7].astype(np.int64)
    named = pages[:, :8].copy().view("<u8")[:, 0]
    counts = (lower - _HEADER_BYTES) // 2
    # Bytes 8 and 9 are not initialized by LMDB, so they are not compared.
    is_right = (named == np.asarray(numbers, np.uint64)) & (halves[:, 5] == kind)
    is_right &= (lower % 2 == 0) & (counts > 0) & (lower <= upper) & (upper <= page_bytes)
    if not is_right.all():
        what = "leaf" if kind == _P_LEAF else "branch"
        raise Fault(f"page {numbers[int(np.argmin(is_right))]} is no {what}")
    page_of = np.repeat(np.arange(len(numbers)), counts)
    first_nodes = np.cumsum(counts) - counts
    slot = np.arange(len(page_of)) - first_nodes[page_of]
    flat, base = halves.reshape(-1), page_of * (page_bytes // 2)
    at = flat.take(base + _HEADER_BYTES // 2 + slot).astype(np.int64)
    if ((at % 2 != 0) | (at < upper[page_of]) | (at + _NODE_BYTES > page_bytes)).any():
        raise Fault("a node lies outside its page")
    headers = np.lib.stride_tricks.sliding_window_view(flat, _NODE_BYTES // 2)[base + at // 2]
    node = np.ascontiguousarray(headers.T).astype(np.int64)
    return _Nodes(pages, page_of, at, node, first_nodes, upper)
