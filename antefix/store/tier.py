"""Tiers: the places that stored KV is read from, each with a name, a kind and a speed measured while it is used.

A worker's own disk, another host's store, an object store: readers treat them alike, by what they hold and how long
they take. A tier promises nothing: what it does not have, or does not give in time, is read elsewhere or computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol, runtime_checkable

from antefix.errors import DeadlineExceeded, Unavailable
from antefix.linear_law import SECONDS_MIN, LinearLaw
from antefix.record import Held, RecordKind
from antefix.store.standing import Standing


class TierKind(StrEnum):
    """How far away a tier is, nearest first. Values are part of receipts and metrics: never renamed."""

    DISK = "disk"
    PEER = "peer"
    OBJECT = "object"


# Believed until a tier was measured: seconds per read, and bytes per second. Pessimistic, as the planner's priors.
_PRIORS: Final = {
    TierKind.DISK: (0.002, 500e6),
    TierKind.PEER: (0.004, 250e6),
    TierKind.OBJECT: (0.1, 100e6),
}
# How much of a prediction's error, as a factor, is believed at once; and the most that a law is corrected by (e^9).
_BELIEF: Final = 0.4
_SLOWER_MAX: Final = 9.0
# Slowness counts half after so long without a read.
_FORGOTTEN_S: Final = 30.0
# What is typical of one read, which makes the prior weigh the same for calls and bytes.
_TYPICAL_BYTES: Final = 32e6


class TierSource(Protocol):
    """What can be read of a tier. Every `antefix.store.api.Store` is one.

    Each call may raise Unavailable or DeadlineExceeded, which readers take for a miss.
    """

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        """All that is there of `chain`, or of any part of one."""

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        """Fill `into[i]` with block `hashes[i]`, verified; returns the number of leading blocks that are right.

        Nobody writes to `into` after this returned, raised or was cancelled.
        """

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        """One verified payload; None: not there."""

    async def close(self) -> None:
        """Let go of connections and files."""


@runtime_checkable
class LoadedSource(Protocol):
    """A source that knows what it holds from an index, which it loads before it can say anything."""

    async def load(self) -> None:
        """Returns when it is loaded.  Raises:  Unavailable: it cannot be, now."""


class TierSpeed:
    """Predicted latency and bytes per second, corrected by each read. Used from one event loop.

    A fitted law, times how much slower than that reads were of late. The law takes dozens of reads to believe in
    another magnitude; the factor takes some, as when a host is cut off or a disk fails. While nobody reads, slowness is
    forgotten, or a tier that was left for it would never be tried again. It is a law to the planner.
    """

    def __init__(self, kind: TierKind, clock: Callable[[], float] = time.monotonic) -> None:
        latency_s, bytes_per_s = _PRIORS[kind]
        self._law: Final = LinearLaw((latency_s, 1 / bytes_per_s), (1.0, _TYPICAL_BYTES))
        self._clock = clock
        # As a logarithm, and when it was measured.
        self._slower, self._measured_s = 0.0, clock()

    @property
    def _factor(self) -> float:
        if self._slower <= 0:
            return self._slower
        return self._slower * math.pow(0.5, (self._clock() - self._measured_s) / _FORGOTTEN_S)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per read, and per byte."""
        return tuple(each * math.exp(self._factor) for each in self._law.coefficients)

    @property
    def latency_s(self) -> float:
        return self.coefficients[0]

    @property
    def bytes_per_s(self) -> float:
        return 1 / max(self.coefficients[1], 1e-15)

    def seconds(self, features: Sequence[float]) -> float:
        """features: 1 and the bytes, as the law has them."""
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
        # What the law has learnt of it now is not corrected for twice.
        learnt = math.log(max(self._law.seconds(features), SECONDS_MIN) / before_s)
        self._slower = max(-_SLOWER_MAX, min(_SLOWER_MAX, factor + _BELIEF * error - learnt))
        self._measured_s = self._clock()


@dataclass(slots=True, eq=False)
class Tier:
    """One place to read from.

    name: of the store, or of the tier.  source: what is read.  standing: whether it is asked now.
    clock: of monotonic seconds.
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
        """In receipts, metrics and plans, such as `peer:rack-2`."""
        return f"{self.kind}:{self.name}"

    @property
    def is_shunned(self) -> bool:
        """It failed a moment ago, so nobody waits for it now."""
        return self.standing.is_shunned

    def failed(self, err: Exception) -> None:
        """It gave an error. Left alone is only one that does not answer, or not in time.

        What it refuses to one tenant, or a record that is broken, says nothing of what it has for others.
        """
        self.num_failures += 1
        if isinstance(err, (Unavailable, DeadlineExceeded, TimeoutError)):
            self.standing.failed()

    def late(self, begun_s: float) -> None:
        """It was given up, asked at that time of `clock`; it may answer yet."""
        self.num_failures += 1
        self.standing.late(begun_s)

    def answered(self) -> None:
        self.standing.answered()


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRead:
    """What one tier gave of a prefix: blocks, their payload bytes, and for how long it was read. tier: its label."""

    tier: str
    kind: TierKind
    num_blocks: int
    nbytes: int
    seconds: float
