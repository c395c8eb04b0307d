"""Which record depends on which, computed for many records at once. This module knows rows and names, but no files and
no index.

A row's parent is given as the number of the parent's row, or -1. Sums along all ancestors take one round per doubling
of the longest chain: in each round a row adds what the ancestor it points to has gathered, and then points to where
that ancestor pointed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.record import RecordKind
from antefix.store_files.record_format import RecordFlag
from antefix_kvstore.header_rows import numbers_of

Array = npt.NDArray[Any]

_FIRST: Final = int(RecordFlag.FIRST)
_ELSEWHERE: Final = int(RecordFlag.ELSEWHERE)


@dataclass(frozen=True, slots=True)
class Forest:
    """Arrays with one element per row.  parent: the parent's row, or -1.  known_parent: the parent is indexed already.

    stands: the row may be indexed. apart: it is indexed without its parent. prefix_bytes: bytes from the start of its
    chain to this row.
    """

    parent: Array
    known_parent: Array
    stands: Array
    apart: Array
    prefix_bytes: Array

    def children(self) -> Array:
        """For each row, the number of rows that depend on it."""
        hanging = self.stands & (self.parent >= 0)
        return np.bincount(self.parent[hanging], minlength=len(self.parent))


def parent_names(rows: Array) -> Array:
    """The hash of the block that each row depends on. A checkpoint has the hash of its block.  Shapes:  [N] V32."""
    names: Array = np.where(rows["kind"] == RecordKind.BLOCK, rows["parent"], rows["hash"])
    return names


def follow_parents(rows: Array, parents: Array) -> Array:
    """Which rows come directly after the row of the block that they depend on. Most rows do.

    parents: as `parent_names` gives them.  Shapes:  [N] bool.
    """
    follows = np.zeros(len(rows), bool)
    follows[1:] = (rows["kind"][:-1] == RecordKind.BLOCK) & (parents[1:] == rows["hash"][:-1])
    return follows


def hang_together(rows: Array, parents: Array, known_prefix: Mapping[bytes, int], *, takes_apart: bool) -> Forest:
    """Arrange the rows as a forest.

    parents: as `parent_names` gives them.
    known_prefix: prefix bytes by hash, for indexed blocks that rows depend on and that are not among the rows.
    takes_apart: whether rows whose parent may be in another store are indexed without it.
    """
    is_block = rows["kind"] == RecordKind.BLOCK
    is_first = (rows["flags"] & _FIRST) != 0
    follows = follow_parents(rows, parents)
    parent = np.where(follows, np.arange(len(rows)) - 1, -1)
    others = np.flatnonzero(~follows & ~is_first)
    names = parents[others].tolist()
    blocks = np.flatnonzero(is_block)
    place_of = numbers_of(rows["hash"][blocks], names)
    parent[others] = [blocks[place_of[name]] if name in place_of else -1 for name in names]
    parent[is_first] = -1
    above = np.zeros(len(rows), np.int64)
    known_parent = np.zeros(len(rows), bool)
    for at, name in zip(others.tolist(), names, strict=True):
        if parent[at] < 0 and name in known_prefix:
            known_parent[at], above[at] = True, known_prefix[name]
    missing = (parent < 0) & ~is_first & ~known_parent
    lost = _lost(parent, missing)
    apart = np.zeros(len(rows), bool)
    if takes_apart and lost.any():
        may = lost & ((rows["flags"] & _ELSEWHERE) != 0)
        # Only the topmost of these rows stand apart; rows below them depend on them.
        apart = may & (sums_to_root(parent, may.astype(np.int64))[0] == 1)
        parent[apart] = -1
        lost = _lost(parent, missing & ~apart)
    # A checkpoint's prefix is the checkpoint alone: it depends on its block, but is not part of the chain.
    prefix_bytes, _ = sums_to_root(parent, above + rows["payload_bytes"])
    prefix_bytes[~is_block] = rows["payload_bytes"][~is_block]
    return Forest(parent, known_parent, ~lost, apart, prefix_bytes)


def _lost(parent: Array, missing: Array) -> Array:
    """Rows whose topmost ancestor lacks its parent, or whose ancestors form a circle."""
    num_missing, goes_round = sums_to_root(parent, missing.astype(np.int64))
    return (num_missing > 0) | goes_round


def sums_to_root(parent: Array, values: Array) -> tuple[Array, Array]:
    """For each row, the sum of `values` over it and all its ancestors, and whether these form a circle (no topmost
    one).
    """
    num = len(parent)
    # One more row, which is above all others and adds nothing.
    gathered = np.append(values.astype(np.int64), 0)
    upwards = np.append(np.where(parent < 0, num, parent), num)
    for _ in range(max(1, num.bit_length()) + 1):
        if (upwards == num).all():
            break
        gathered += gathered[upwards]
        upwards = upwards[upwards]
    return gathered[:-1], upwards[:-1] != num
