"""How many records hang together, worked out for all of them at once. Pure: knows rows and names, no files, no index.

A row's parent is a number: the parent's row, or -1. Sums along all ancestors take a round per doubling of the longest
chain: in each, a row takes what its present ancestor has gathered, and continues from where that got to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.record import RecordKind
from antefix.store_files.record_format import RecordFlag

Array = npt.NDArray[Any]

_FIRST: Final = int(RecordFlag.FIRST)
_ELSEWHERE: Final = int(RecordFlag.ELSEWHERE)


@dataclass(frozen=True, slots=True)
class Forest:
    """Per row.  parent: its row, or -1.  known_parent: it depends on a record that is indexed already.

    stands: may be indexed.  apart: without its parent.  prefix_bytes: from its chain's start to here.
    """

    parent: Array
    known_parent: Array
    stands: Array
    apart: Array
    prefix_bytes: Array

    def children(self) -> Array:
        """Of each row, how many rows depend on it."""
        hanging = self.stands & (self.parent >= 0)
        return np.bincount(self.parent[hanging], minlength=len(self.parent))


def parent_names(rows: Array) -> list[bytes]:
    """The hash of the block that each row depends on: a checkpoint's has its own hash."""
    is_block = rows["kind"] == RecordKind.BLOCK
    names: list[bytes] = np.where(is_block, rows["parent"], rows["hash"]).tolist()
    return names


def hang_together(
    rows: Array, parents: Sequence[bytes], known_prefix: Mapping[bytes, int], *, takes_apart: bool
) -> Forest:
    """The rows as a forest.

    known_prefix: hash of an indexed block to its prefix bytes; of those that rows depend on and that are no rows.
    takes_apart: rows whose parent may be elsewhere stand without it.
    """
    is_block = rows["kind"] == RecordKind.BLOCK
    is_first = (rows["flags"] & _FIRST) != 0
    numbers = np.flatnonzero(is_block).tolist()
    row_of = dict(zip(rows["hash"][is_block].tolist(), numbers, strict=True))
    parent = np.fromiter((row_of.get(name, -1) for name in parents), np.int64, len(rows))
    parent[is_first] = -1
    above = np.zeros(len(rows), np.int64)
    known_parent = np.zeros(len(rows), bool)
    for at in np.flatnonzero((parent < 0) & ~is_first).tolist():
        if parents[at] in known_prefix:
            known_parent[at], above[at] = True, known_prefix[parents[at]]
    missing = (parent < 0) & ~is_first & ~known_parent
    lost = _lost(parent, missing)
    apart = np.zeros(len(rows), bool)
    if takes_apart and lost.any():
        may = lost & ((rows["flags"] & _ELSEWHERE) != 0)
        # The topmost ones; what is below them depends on them.
        apart = may & (sums_to_root(parent, may.astype(np.int64))[0] == 1)
        parent[apart] = -1
        lost = _lost(parent, missing & ~apart)
    # A checkpoint's prefix is itself: it depends on its block, but is no part of the chain.
    prefix_bytes, _ = sums_to_root(parent, above + rows["payload_bytes"])
    prefix_bytes[~is_block] = rows["payload_bytes"][~is_block]
    return Forest(parent, known_parent, ~lost, apart, prefix_bytes)


def _lost(parent: Array, missing: Array) -> Array:
    """Rows at whose top a parent is missing, or which go round in a circle."""
    num_missing, goes_round = sums_to_root(parent, missing.astype(np.int64))
    return (num_missing > 0) | goes_round


def sums_to_root(parent: Array, values: Array) -> tuple[Array, Array]:
    """Of each row, the sum of `values` over itself and all its ancestors, and whether it has no topmost one."""
    num = len(parent)
    # One more row, above all others, which adds nothing.
    gathered = np.append(values.astype(np.int64), 0)
    upwards = np.append(np.where(parent < 0, num, parent), num)
    for _ in range(max(1, num.bit_length()) + 1):
        if (upwards == num).all():
            break
        gathered += gathered[upwards]
        upwards = upwards[upwards]
    return gathered[:-1], upwards[:-1] != num
