"""Which store probably has which part of a prompt's chain, as a router told with the call: then nobody else is asked.

It is a hint and may be stale. What is not where it should be is read elsewhere or computed, and what is somewhere else
is computed again. A store that it does not name is asked, and so are a worker's own stores, which know better.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from antefix.record import Held, LookupResult

# Behind every block.
_FAR: Final = 1 << 62

_told: ContextVar[Located | None] = ContextVar("antefix_located", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """held: by the stores' names, of the blocks of `chain`.

    found: what they have together, and where it is nearest to the one who looked; empty where it was told.
    """

    chain: Sequence[bytes]
    fingerprint: bytes
    held: Mapping[str, Held]
    found: LookupResult = field(default_factory=lambda: LookupResult(num_blocks=0))
    _index: dict[bytes, int] = field(default_factory=dict, repr=False, compare=False)

    def of(self, store: str, hashes: Sequence[bytes], fingerprint: bytes) -> Held | None:
        """What that store has of these blocks; None: nobody has said."""
        held = self.held.get(store)
        if held is None or not hashes or fingerprint != self.fingerprint:
            return None
        start = self._place_of(hashes[0])
        if start is None or list(self.chain[start : start + len(hashes)]) != list(hashes):
            return None
        stop = start + len(hashes)
        spans = tuple(
            (max(first, start) - start, min(last, stop) - start)
            for first, last in held.spans
            if first < stop and last > start
        )
        low, high = bisect_right(held.checkpoints, start), bisect_right(held.checkpoints, stop)
        return Held(spans=spans, checkpoints=tuple(block - start for block in held.checkpoints[low:high]))

    def with_span(self, stores: Iterable[str], start: int, stop: int) -> Located:
        """The same, and these stores have got blocks [start, stop) since, and a checkpoint at their end perhaps."""
        if start >= stop:
            return self
        more = {name: _with_span(self.held.get(name, Held()), start, stop) for name in stores}
        return replace(self, held={**self.held, **more})

    def parts(self, num_blocks: int) -> list[tuple[int, frozenset[str]]]:
        """The first blocks in runs that the same stores have: how many, and which stores."""
        bounds = {0, num_blocks}
        for held in self.held.values():
            bounds.update(min(bound, num_blocks) for span in held.spans for bound in span)
        ends = sorted(bounds)
        return [
            (stop - start, frozenset(name for name, held in self.held.items() if _has(held, start)))
            for start, stop in pairwise(ends)
        ]

    def _place_of(self, hash: bytes) -> int | None:
        if not self._index:
            self._index.update((each, number) for number, each in enumerate(self.chain))
        return self._index.get(hash)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSpeed:
    """How fast a worker reads stored KV from a store or another tier, as it has measured."""

    latency_s: float
    seconds_per_token: float

    @property
    def is_sound(self) -> bool:
        return 0 <= self.latency_s < math.inf and 0 <= self.seconds_per_token < math.inf

    def seconds(self, num_tokens: int) -> float:
        return self.latency_s + self.seconds_per_token * num_tokens


def tell(located: Located | None) -> None:
    """This task, and those that it starts from now on, go by this; None: by nobody's word."""
    _told.set(located)


def told() -> Located | None:
    """What this task goes by."""
    return _told.get()


def _has(held: Held, block: int) -> bool:
    number = bisect_right(held.spans, (block, _FAR))
    return number > 0 and held.spans[number - 1][1] > block


def _with_span(held: Held, start: int, stop: int) -> Held:
    before = [span for span in held.spans if span[1] < start]
    after = [span for span in held.spans if span[0] > stop]
    joined = [span for span in held.spans if span[1] >= start and span[0] <= stop]
    first = min([start, *(span[0] for span in joined)])
    last = max([stop, *(span[1] for span in joined)])
    checkpoints = list(held.checkpoints)
    if bisect_left(checkpoints, stop) == bisect_right(checkpoints, stop):
        checkpoints = sorted([*checkpoints, stop])
    return Held(spans=(*before, (first, last), *after), checkpoints=tuple(checkpoints))
