"""Reads many leaf pages of an LMDB file at once as numpy arrays, and checks them.

Letters:  P = pages of a batch, N = nodes on them, in the order of keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Overflow = Callable[[int, int], bytes]

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
        keys, bounds = self._padded_keys(width), _padded([last, *lows], width)
        first, stop = self.first_nodes, np.append(self.first_nodes[1:], self.num_nodes)
        are_higher = [
            _greater(keys[1:], keys[:-1]),
            ~_greater(bounds[1:], keys[first]),
            # The last key of each page lies below the next page's bound.
            _greater(bounds[2:], keys[stop[:-1] - 1]),
        ]
        if last:
            are_higher.append(_greater(keys[:1], bounds[:1]))
        if not all(higher.all() for higher in are_higher):
            raise Fault("keys are not in order")
        return self.key(self.num_nodes - 1)

    def _padded_keys(self, width: int) -> Array:
        """The keys of all nodes, padded to one length as by `_padded`."""
        padded = np.zeros((self.num_nodes, width), np.uint8)
        for nbytes in np.unique(self.key_bytes).tolist():
            nodes = np.flatnonzero(self.key_bytes == nbytes)
            padded[nodes, :nbytes] = self.gather(nodes, 0, nbytes)
        padded[:, -1] = self.key_bytes & 0xFF
        return padded.view(">u8")


def _padded(keys: Sequence[bytes], width: int) -> Array:
    """Shapes:  [len(keys), W] big-endian u64 words: the key, zeros, then its length. These compare in the order of the
    keys.
    """
    rows = b"".join(key.ljust(width - 1, b"\0") + bytes([len(key) & 0xFF]) for key in keys)
    return np.frombuffer(rows, ">u8").reshape(len(keys), width // 8)


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
    raw = bytearray(len(numbers) * page_bytes)
    view = memoryview(raw)
    for place, number in enumerate(numbers):
        if os.preadv(fd, [view[place * page_bytes : (place + 1) * page_bytes]], number * page_bytes) < page_bytes:
            raise Fault("it is shorter than it says")
    pages = np.frombuffer(raw, np.uint8).reshape(len(numbers), page_bytes)
    halves = pages.view("<u2")
    lower, upper = halves[:, 6].astype(np.int64), halves[:, 7].astype(np.int64)
    named = pages[:, :8].copy().view("<u8")[:, 0]
    counts = (lower - _HEADER_BYTES) // 2
    # Bytes 8 and 9 are not initialized by LMDB, so they are not compared.
    is_leaf = (named == np.asarray(numbers, np.uint64)) & (halves[:, 5] == _P_LEAF)
    is_leaf &= (lower % 2 == 0) & (counts > 0) & (lower <= upper) & (upper <= page_bytes)
    if not is_leaf.all():
        raise Fault(f"page {numbers[int(np.argmin(is_leaf))]} is no leaf")
    page_of = np.repeat(np.arange(len(numbers)), counts)
    first_nodes = np.cumsum(counts) - counts
    slot = np.arange(len(page_of)) - first_nodes[page_of]
    at = halves[page_of, _HEADER_BYTES // 2 + slot].astype(np.int64)
    if ((at % 2 != 0) | (at < upper[page_of]) | (at + _NODE_BYTES > page_bytes)).any():
        raise Fault("a node lies outside its page")
    node = [halves[page_of, at // 2 + word].astype(np.int64) for word in range(4)]
    value_bytes, flags, key_bytes = node[0] | node[1] << 16, node[2], node[3]
    is_big = flags == _BIG
    taken = _NODE_BYTES + key_bytes + np.where(is_big, 8, value_bytes)
    _check_nodes(page_of, at, taken, upper, page_bytes)
    # A named table's record may be in the main tree only; its length identifies it there.
    if ((flags != 0) & ~is_big & (flags != _SUBTABLE)).any():
        raise Fault("a node is of an unknown kind")
    batch = LeafBatch(pages, page_of, at, key_bytes, value_bytes, first_nodes)
    for number in np.flatnonzero(is_big).tolist():
        start = batch.gather(np.array([number]), batch.key_bytes[[number]], 8)
        batch.big[number] = overflow(int(start.copy().view("<u8")[0, 0]), int(value_bytes[number]))
    return batch


def _check_nodes(page_of: Array, at: Array, taken: Array, upper: Array, page_bytes: int) -> None:
    """Check that the nodes of each page fill it from `upper` to its end without gaps, each at an even offset.

    Raises:  Fault.
    """
    taken = taken + taken % 2
    if (at + taken > page_bytes).any():
        raise Fault("a node lies outside its page")
    order = np.argsort(page_of * page_bytes + at, kind="stable")
    begin, stop, page = at[order], (at + taken)[order], page_of[order]
    is_last = np.append(page[1:] != page[:-1], True)
    follows = np.append(begin[1:], 0)
    is_first = np.append(True, is_last[:-1])
    whole = np.where(is_last, page_bytes, follows) == stop
    if not whole.all() or (begin[is_first] != upper[page[is_first]]).any():
        raise Fault("nodes lie over one another")
