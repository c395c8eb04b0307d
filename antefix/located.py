"""Which store probably has which part of a prompt's chain. A router sends this hint with a call, so that the worker
need not ask the stores.

The message is a hint and may be stale. A block that is not where the hint says is read elsewhere or computed; a block
that is stored where the hint does not say is computed again. The worker still asks the stores that the hint does not
name, and its own stores, because their answers are newer.
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
from antefix.tier_kind import TierKind, label_of

# A number greater than any block's.
_FAR: Final = 1 << 62
# The parts of a store that a worker with its files tells apart.
_PARTS: Final = (TierKind.PAGE_CACHE, TierKind.DISK)

_told: ContextVar[Located | None] = ContextVar("antefix_located", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """held: what each store has of the blocks of `chain`, by the store's name.

    found: which blocks the stores have together, and which tier of the looking process is nearest; empty if another
    process sent this object.
    """

    chain: Sequence[bytes]
    fingerprint: bytes
    held: Mapping[str, Held]
    found: LookupResult = field(default_factory=lambda: LookupResult(num_blocks=0))
    _index: dict[bytes, int] = field(default_factory=dict, repr=False, compare=False)

    def of(self, store: str, hashes: Sequence[bytes], fingerprint: bytes) -> Held | None:
        """Which of these blocks that store has; None if this object does not say."""
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
        """A copy in which these stores also have blocks [start, stop), and a checkpoint at `stop`."""
        if start >= stop:
            return self
        more = {name: _with_span(self.held.get(name, Held()), start, stop) for name in stores}
        return replace(self, held={**self.held, **more})

    def parts(self, num_blocks: int) -> list[tuple[int, frozenset[str]]]:
        """The first `num_blocks` blocks, cut into runs of blocks that the same stores have: (number of blocks, stores).

        A store that knows what its host's page cache has is named as `speed_of` takes it: by the label of its page
        cache or of its disk.
        """
        bounds = {0, num_blocks}
        for held in self.held.values():
            bounds.update(min(bound, num_blocks) for span in (*held.spans, *(held.cached or ())) for bound in span)
        ends = sorted(bounds)
        return [
            (
                stop - start,
                frozenset(_place(name, held, start) for name, held in self.held.items() if _has(held, start)),
            )
            for start, stop in pairwise(ends)
        ]

    def _place_of(self, hash: bytes) -> int | None:
        if not self._index:
            self._index.update((each, number) for number, each in enumerate(self.chain))
        return self._index.get(hash)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSpeed:
    """How fast a worker reads stored KV from a store or another tier, by its own measurements."""

    latency_s: float
    seconds_per_token: float

    @property
    def is_sound(self) -> bool:
        return 0 <= self.latency_s < math.inf and 0 <= self.seconds_per_token < math.inf

    def seconds(self, num_tokens: int) -> float:
        return self.latency_s + self.seconds_per_token * num_tokens


def speed_of(place: str, speeds: Mapping[str, ReadSpeed]) -> ReadSpeed | None:
    """How fast a worker reads from a place that `Located.parts` names. None: it has not said.

    Only a worker that reads the store's files itself can tell the page cache from the disk; other workers know only the
    speed of the whole store.
    """
    if place in speeds:
        return speeds[place]
    kind, _, name = place.partition(":")
    return speeds.get(name) if kind in _PARTS else None


def tell(located: Located | None) -> None:
    """Set the hint that this task, and the tasks that it starts from now on, use; None: no hint."""
    _told.set(located)


def told() -> Located | None:
    """The hint about stored blocks that this task uses."""
    return _told.get()


def _has(held: Held, block: int) -> bool:
    return _within(held.spans, block)


def _place(store: str, held: Held, block: int) -> str:
    if held.cached is None:
        return store
    return label_of(TierKind.PAGE_CACHE if _within(held.cached, block) else TierKind.DISK, store)


def _within(spans: Sequence[tuple[int, int]], block: int) -> bool:
    number = bisect_right(spans, (block, _FAR))
    return number > 0 and spans[number - 1][1] > block


def _with_span(held: Held, start: int, stop: int) -> Held:
    before = [span for span in held.spans if span[1] < start]
    after = [span for span in held.spans if span[0] > stop]
    joined = [span for span in held.spans if span[1] >= start and span[0] <= stop]
    first = min([start, *(span[0] for span in joined)])
    last = max([stop, *(span[1] for span in joined)])
    checkpoints = list(held.checkpoints)
    if bisect_left(checkpoints, stop) == bisect_right(checkpoints, stop):
        checkpoints = sorted([*checkpoints, stop])
    return replace(held, spans=(*before, (first, last), *after), checkpoints=tuple(checkpoints))
