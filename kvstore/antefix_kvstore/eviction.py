"""The order in which records are evicted. This module knows sizes, times and costs, but no files and no clock. The
simulator uses it too.

Records form a forest: a block's parent is the block before it, a checkpoint depends on its block. Only leaves are
evicted, so the ancestors of a stored record are always stored. Among leaves, the one with the lowest rank is evicted
first.

Rank. The chance that a record is used again falls with its idle time. We assume that it halves every `half_life_s`, so
keeping a record saves  cost / bytes * 2^(-idle / half_life).  The order of these values does not change as time passes,
so a fixed number can stand for it: rank = last use + half_life * log2(cost per byte / reference). If all costs are
equal, this order is LRU.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

# Eviction and compaction free more than a put needs, because each run costs commits whatever its size: a 128th of the
# store, and up to a 32nd in small stores.
_AHEAD_SHARE: Final = 1 / 128
_AHEAD_SHARE_MAX: Final = 1 / 32
_AHEAD_BYTES: Final = 64 << 20

Array = npt.NDArray[Any]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionPolicy:
    """half_life_s: after this time without use, a record is half as likely to be used again (agent traces: 81% of reuse
    is within 60 s, 95% within 5 min).  reference_cost_s_per_byte: V4-Flash prefill at 18,000 tokens/s, 3,514 bytes per
    token.
    doublings_max: limits how far the cost of a record can move its rank, in half-lives, in case the cost is wrong.
    """

    half_life_s: float = 120.0
    reference_cost_s_per_byte: float = 1 / 18_000 / 3_514
    doublings_max: float = 6.0

    def rank_ms(self, *, used_ms: int, cost_s: float, nbytes: int) -> int:
        """The number by which leaves are ordered for eviction. A cost of 0 (unknown) counts as the reference cost."""
        if cost_s <= 0 or nbytes <= 0:
            return used_ms
        doublings = math.log2(cost_s / nbytes / self.reference_cost_s_per_byte)
        doublings = max(-self.doublings_max, min(self.doublings_max, doublings))
        return max(0, used_ms + round(1000 * self.half_life_s * doublings))

    def ranks_ms(self, *, used_ms: Array, cost_s: Array, nbytes: Array) -> Array:
        """`rank_ms` of many records at once.  Shapes:  all [N]; result [N] int64."""
        known = (cost_s > 0) & (nbytes > 0)
        value = np.where(known, cost_s, 1.0) / np.where(known, nbytes, 1) / self.reference_cost_s_per_byte
        doublings = np.clip(np.log2(value), -self.doublings_max, self.doublings_max)
        moved = np.maximum(0, used_ms + np.rint(1000 * self.half_life_s * doublings).astype(np.int64))
        return np.where(known, moved, used_ms)


def ahead_bytes(limit_bytes: int) -> int:
    """How many bytes beyond its need a store of this size frees at once."""
    return int(max(_AHEAD_SHARE * limit_bytes, min(_AHEAD_SHARE_MAX * limit_bytes, _AHEAD_BYTES)))


def victims(
    leaves: Iterable[tuple[int, Name]],
    *,
    remove: Callable[[Name], tuple[int, Name] | None],
    evictable: Callable[[Name], bool],
) -> Iterator[Name]:
    """Leaves in the order in which they are evicted; each is removed before it is yielded.

    leaves: Pairs (rank, name), lowest rank first, at the start. remove: removes a leaf, and returns its parent with the
    parent's rank if the parent is a leaf now, else None. The caller stops iterating when enough is freed.
    """
    exposed: list[tuple[int, Name]] = []
    for rank, name in leaves:
        while exposed and exposed[0][0] <= rank:
            yield from _take(exposed, heapq.heappop(exposed)[1], remove, evictable)
        yield from _take(exposed, name, remove, evictable)
    while exposed:
        yield from _take(exposed, heapq.heappop(exposed)[1], remove, evictable)


def _take(
    exposed: list[tuple[int, Name]],
    name: Name,
    remove: Callable[[Name], tuple[int, Name] | None],
    evictable: Callable[[Name], bool],
) -> Iterator[Name]:
    if not evictable(name):
        return
    parent = remove(name)
    if parent is not None:
        heapq.heappush(exposed, parent)
    yield name


@dataclass(slots=True)
class _Node(Generic[Name]):
    parent: Name | None
    nbytes: int
    cost_s: float
    rank_ms: int
    children: int = 0


class Forest(Generic[Name]):
    """The records of a store in memory only, for replaying traces. The storage engine keeps the same forest in its
    index.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.nbytes = 0
        self._nodes: dict[Name, _Node[Name]] = {}

    def __contains__(self, name: Name) -> bool:
        return name in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def insert(self, name: Name, *, parent: Name | None, nbytes: int, now_ms: int, cost_s: float = 0.0) -> None:
        """Raises:  KeyError: the parent is not stored, or the name is stored already."""
        if name in self._nodes:
            raise KeyError(name)
        if parent is not None:
            self._nodes[parent].children += 1
        rank = self.policy.rank_ms(used_ms=now_ms, cost_s=cost_s, nbytes=nbytes)
        self._nodes[name] = _Node(parent, nbytes, cost_s, rank)
        self.nbytes += nbytes

    def touch(self, name: Name, now_ms: int) -> None:
        """Note a use. A use of a leaf is also a use of all its ancestors; it is counted for each ancestor when that
        becomes a leaf.
        """
        node = self._nodes[name]
        rank = self.policy.rank_ms(used_ms=now_ms, cost_s=node.cost_s, nbytes=node.nbytes)
        node.rank_ms = max(node.rank_ms, rank)

    def evict(self, nbytes: int, *, keep: Callable[[Name], bool] = lambda _: False) -> list[Name]:
        """Free at least `nbytes` if possible. Returns the evicted names in order."""
        taken: list[Name] = []
        goal = self.nbytes - nbytes
        leaves = sorted(
            ((node.rank_ms, name) for name, node in self._nodes.items() if not node.children), key=lambda leaf: leaf[0]
        )
        if nbytes > 0:
            for name in victims(leaves, remove=self._remove, evictable=lambda name: not keep(name)):
                taken.append(name)
                if self.nbytes <= goal:
                    break
        return taken

    def _remove(self, name: Name) -> tuple[int, Name] | None:
        node = self._nodes.pop(name)
        self.nbytes -= node.nbytes
        if node.parent is None:
            return None
        parent = self._nodes[node.parent]
        parent.children -= 1
        parent.rank_ms = max(parent.rank_ms, node.rank_ms)
        return None if parent.children else (parent.rank_ms, node.parent)
