"""Tiers: the places that stored KV is read from, each with a name, a kind and a speed measured while it is used.

A tier is the page cache of a worker's own host, its own disk, another host's store, or an object store. Readers treat
all tiers alike: they know which blocks a tier holds and how fast it is. Blocks that a tier does not have, or does not
deliver in time, are read elsewhere or computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

from antefix.errors import DeadlineExceeded, Unavailable
from antefix.linear_law import LOAD_FOLLOW, SECONDS_MIN, LinearLaw
from antefix.record import Held, RecordKind
from antefix.store.standing import Standing
from antefix.tier_kind import TierKind, label_of

# The assumed speed of a tier until it is measured: seconds per read, and bytes per second. Pessimistic, like the
# planner's priors.
_PRIORS: Final = {
    TierKind.PAGE_CACHE: (0.001, 2e9),
    TierKind.DISK: (0.002, 500e6),
    TierKind.PEER: (0.004, 250e6),
    TierKind.OBJECT: (0.1, 100e6),
}
# The share of a prediction's log error that one read corrects, and the limit of the whole correction (a factor of e^9).
_BELIEF: Final = 0.4
_SLOWER_MAX: Final = 9.0
# The half-life of a measured slowdown while the tier is not read, in seconds.
_FORGOTTEN_S: Final = 30.0
# The half-life of the bytes that count as read recently, in seconds.
_RECENT_S: Final = 60.0
# The bytes of a typical read. It scales the law so that the prior weighs latency and bytes equally.
_TYPICAL_BYTES: Final = 32e6


class TierSource(Protocol):
    """The calls that a source of a tier must answer. Every `antefix.store.api.Store` is a TierSource.

    Each call may raise Unavailable or DeadlineExceeded, and readers treat either error as a cache miss.
    """

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        """Which blocks and checkpoints of `chain` the source has; `chain` may be a part of a chain."""

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        """Fill `into[i]` with block `hashes[i]` and verify it. Returns the number of leading blocks that passed all
        checks.

        After this call has returned, raised or was cancelled, no thread writes to `into`.
        """

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        """One verified payload; None if the tier does not have it."""

    async def close(self) -> None:
        """Close connections and files."""


@runtime_checkable
class LoadedSource(Protocol):
    """A source of a tier that must load an index before it can answer."""

    async def load(self) -> None:
        """Load the index.  Raises:  Unavailable: the source's index cannot be loaded now."""


class TierSpeed:
    """Predicts a tier's latency and bytes per second, and learns from each read. Used from one event loop.

    The prediction is a fitted linear law times a factor: how much slower than the law recent reads were. The law needs
    dozens of reads to change by an order of magnitude. The factor needs only a few reads, for example when a host is
    cut off or a disk fails. While the tier is not read, a slowdown decays, because a tier that is avoided as slow would
    otherwise never be tried again. The planner uses this object like a `LinearLaw`.
    """

    def __init__(self, kind: TierKind, clock: Callable[[], float] = time.monotonic) -> None:
        latency_s, bytes_per_s = _PRIORS[kind]
        self._law: Final = LinearLaw((latency_s, 1 / bytes_per_s), (1.0, _TYPICAL_BYTES), follow=LOAD_FOLLOW)
        self._clock = clock
        # The logarithm of the slowdown factor, and when it was measured.
        self._slower, self._measured_s = 0.0, clock()
        self._bytes = 0.0

    @property
    def _factor(self) -> float:
        if self._slower <= 0:
            return self._slower
        return self._slower * math.pow(0.5, (self._clock() - self._measured_s) / _FORGOTTEN_S)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Predicted seconds per read of this tier, and per byte."""
        return tuple(each * math.exp(self._factor) for each in self._law.coefficients)

    @property
    def latency_s(self) -> float:
        return self.coefficients[0]

    @property
    def bytes_per_s(self) -> float:
        return 1 / max(self.coefficients[1], 1e-15)

    @property
    def recent_bytes(self) -> float:
        """The number of bytes read from this tier in about the last minute. In this number, older reads count less and
        less.
        """
        return self._bytes * math.pow(0.5, (self._clock() - self._measured_s) / _RECENT_S)

    def seconds(self, features: Sequence[float]) -> float:
        """Predicted seconds of a read from this tier. features: (1, bytes), as the law expects them."""
        return self._law.seconds(features) * math.exp(self._factor)

    def predicted_s(self, nbytes: int) -> float:
        return self.seconds((1.0, float(nbytes)))

    def observe(self, nbytes: int, seconds: float) -> None:
        features = (1.0, float(nbytes))
        if not SECONDS_MIN <= seconds < math.inf:
            return
        factor, before_s = self._factor, max(self._law.seconds(features), SECONDS_MIN)
        error = math.log(seconds / max(self.predicted_s(nbytes), SECONDS_MIN))
        self._law.observe(features, seconds)
        # Subtract what the law itself has just learnt from this read, so that it is not corrected twice.
        learnt = math.log(max(self._law.seconds(features), SECONDS_MIN) / before_s)
        self._slower = max(-_SLOWER_MAX, min(_SLOWER_MAX, factor + _BELIEF * error - learnt))
        self._bytes = self.recent_bytes + nbytes
        self._measured_s = self._clock()


@dataclass(slots=True, eq=False)
class Tier:
    """One place to read stored KV from.

    name: the name of the store or tier.  source: answers the reads.  standing: decides whether the tier is asked now.
    clock: returns monotonic seconds.
    """

    name: str
    kind: TierKind
    source: TierSource
    clock: Callable[[], float] = time.monotonic
    speed: TierSpeed = field(init=False)
    standing: Standing = field(init=False)
    num_failures: int = 0

    def __post_init__(self) -> None:
        self.speed = TierSpeed(self.kind, self.clock)
        self.standing = Standing(self.clock)

    @property
    def label(self) -> str:
        """The tier's label in receipts, metrics and plans, such as `peer:rack-2`."""
        return label_of(self.kind, self.name)

    def in_page_cache(self) -> Tier:
        """The tier for those records of this store that are in the page cache of this host, which has the same files
        but another speed.
        """
        tier = Tier(self.name, TierKind.PAGE_CACHE, self.source, self.clock)
        tier.standing = self.standing
        return tier

    @property
    def is_shunned(self) -> bool:
        """Whether the tier failed a short time ago and is not known to be back, so that it is not asked now."""
        return self.standing.is_shunned

    def failed(self, err: Exception) -> None:
        """Record an error that a call to the tier raised. Only a tier that did not answer, or not in time, is left out
        for a short time.

        A refusal to one tenant or a broken record says nothing about the tier's other records.
        """
        self.num_failures += 1
        if isinstance(err, (Unavailable, DeadlineExceeded, TimeoutError)):
            self.standing.failed()

    def late(self, begun_s: float) -> None:
        """Record that a question asked at `begun_s` (by `clock`) was given up. The tier may still answer the question
        later.
        """
        self.num_failures += 1
        self.standing.late(begun_s)

    def answered(self) -> None:
        self.standing.answered()


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRead:
    """What one tier delivered of a prefix: the number of blocks, the payload bytes, and the seconds of reading. tier:
    the tier's label.
    """

    tier: str
    kind: TierKind
    num_blocks: int
    nbytes: int
    seconds: float
