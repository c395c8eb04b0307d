"""The prefixes that the newest prompts share, as a forest: each node is a run of blocks, given by their hashes.
The size of the forest is bounded; the least used runs are dropped.

node     a run of blocks shared by all prompts through it, so it has no children or at least two
insert   follow the forest while blocks are equal; where they differ inside a run, split the run in two
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

# The most hashes kept in all, 32 bytes each.
HASHES_MAX: Final = 200_000
_ROOTS_MAX: Final = 2_000


@dataclass(slots=True, eq=False)
class Run:
    """num_prompts: how many prompts went through this run of blocks. tenants: their owners' digests. used_at: Unix
    seconds.
    """

    hashes: list[bytes]
    parent: Run | None
    children: dict[bytes, Run] = field(default_factory=dict)
    num_prompts: int = 0
    tenants: set[bytes] = field(default_factory=set)
    used_at: float = 0.0

    @property
    def path(self) -> list[bytes]:
        """The hashes of all blocks from the beginning of the prompt to the end of this run."""
        runs: list[list[bytes]] = []
        each: Run | None = self
        while each is not None:
            runs.append(each.hashes)
            each = each.parent
        return list(itertools.chain.from_iterable(reversed(runs)))


class PrefixForest:
    """The prefixes of one router's prompts since it started."""

    def __init__(self, hashes_max: int = HASHES_MAX, clock: Callable[[], float] = time.time) -> None:
        self.roots: dict[bytes, Run] = {}
        self.num_hashes = 0
        self._hashes_max = hashes_max
        self._clock = clock

    def note(self, hashes: Sequence[bytes], owner: bytes) -> None:
        """Add a prompt to the forest, given the hashes of its whole blocks in order."""
        if not hashes or len(hashes) > self._hashes_max:
            return
        now, children, parent, at = self._clock(), self.roots, None, 0
        while at < len(hashes):
            run = children.get(hashes[at])
            if run is None:
                run = Run(list(hashes[at:]), parent)
                children[hashes[at]] = run
                self.num_hashes += len(run.hashes)
                at = len(hashes)
            else:
                same = _same(run.hashes, hashes, at)
                if same < len(run.hashes):
                    self._cut(run, same)
                at += same
            run.num_prompts += 1
            run.tenants.add(owner)
            run.used_at = now
            parent, children = run, run.children
        self._forget()

    def walk(self) -> Iterator[Run]:
        """Every run, parents first."""
        waiting = list(self.roots.values())
        while waiting:
            run = waiting.pop()
            yield run
            waiting += run.children.values()

    def _cut(self, run: Run, num_first: int) -> None:
        """Split the run. The node that is split keeps its first blocks; the remaining blocks become its only child for
        now.
        """
        rest = Run(run.hashes[num_first:], run, run.children, run.num_prompts, set(run.tenants), run.used_at)
        for child in rest.children.values():
            child.parent = rest
        run.hashes = run.hashes[:num_first]
        run.children = {rest.hashes[0]: rest}

    def _forget(self) -> None:
        while self.num_hashes > self._hashes_max or len(self.roots) > _ROOTS_MAX:
            leaves = [run for run in self.walk() if not run.children]
            # Drop a quarter at once, because this examines every run.
            for run in sorted(leaves, key=lambda run: run.used_at)[: max(1, len(leaves) // 4)]:
                self._drop(run)

    def _drop(self, run: Run) -> None:
        siblings = self.roots if run.parent is None else run.parent.children
        del siblings[run.hashes[0]]
        self.num_hashes -= len(run.hashes)
        if run.parent is not None and len(siblings) == 1:
            self._join(run.parent)

    def _join(self, run: Run) -> None:
        """Merge a run with its only remaining child, unless a prompt ends between them."""
        (child,) = run.children.values()
        if child.num_prompts != run.num_prompts:
            return
        run.hashes += child.hashes
        run.children = child.children
        for each in run.children.values():
            each.parent = run


def _same(run: Sequence[bytes], hashes: Sequence[bytes], at: int) -> int:
    """How many of the run's blocks equal the prompt's blocks from `at` on; at least one is known to be equal."""
    most = min(len(run), len(hashes) - at)
    return next((index for index in range(1, most) if run[index] != hashes[at + index]), most)
