"""Tiers: the places that stored KV is read from, each with a name, a kind and a speed measured while it is used.

A worker's own disk, another host's store, an object store: readers treat them alike, by what they hold and how long
they take. A tier promises nothing: what it does not have, or does not give in time, is read elsewhere or computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from antefix.linear_law import LinearLaw
from antefix.record import Held, RecordKind

# A tier that failed is left alone for so long; each further failure in a row doubles it.
SHUNNED_S: Final = 1.0
SHUNNED_S_MAX: Final = 30.0


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


class TierSpeed:
    """Predicted latency and bytes per second, corrected by each read. Used from one event loop."""

    def __init__(self, kind: TierKind) -> None:
        latency_s, bytes_per_s = _PRIORS[kind]
        self.law: Final = LinearLaw((latency_s, 1 / bytes_per_s), (1.0, _TYPICAL_BYTES))

    @property
    def latency_s(self) -> float:
        return self.law.coefficients[0]

    @property
    def bytes_per_s(self) -> float:
        return 1 / max(self.law.coefficients[1], 1e-15)

    def predicted_s(self, nbytes: int) -> float:
        return self.law.seconds((1.0, float(nbytes)))

    def observe(self, nbytes: int, seconds: float) -> None:
        self.law.observe((1.0, float(nbytes)), seconds)


@dataclass(slots=True, eq=False)
class Tier:
    """One place to read from.

    name: of the store, or of the tier.  source: what is read.
    clock: of monotonic seconds.
    """

    name: str
    kind: TierKind
    source: TierSource
    clock: Callable[[], float] = time.monotonic
    speed: TierSpeed = field(init=False)
    num_failures: int = 0
    _num_in_a_row: int = 0
    _shunned_until: float = 0.0

    def __post_init__(self) -> None:
        self.speed = TierSpeed(self.kind)

    @property
    def label(self) -> str:
        """In receipts, metrics and plans, such as `peer:rack-2`."""
        return f"{self.kind}:{self.name}"

    @property
    def is_shunned(self) -> bool:
        """It failed a moment ago, so nobody waits for it now."""
        return self.clock() < self._shunned_until

    def failed(self) -> None:
        """It did not answer, or not in time."""
        self.num_failures += 1
        pause = min(SHUNNED_S * 2**self._num_in_a_row, SHUNNED_S_MAX)
        self._num_in_a_row += 1
        self._shunned_until = self.clock() + pause

    def answered(self) -> None:
        self._num_in_a_row, self._shunned_until = 0, 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRead:
    """What one tier gave of a prefix: blocks, their payload bytes, and for how long it was read. tier: its label."""

    tier: str
    kind: TierKind
    num_blocks: int
    nbytes: int
    seconds: float
