"""Keeps a store that hangs, or is too slow, from costing more than it saves.

    the store is silent (antefix.pulse)   every call fails at once, until the store answers again
    one call exceeds its time limit       the next call gets twice as long for its bytes
    NUM_LATE_MAX such calls in a row      calls fail at once for OPEN_S, or until the store went silent and came back;
                                          then calls are tried again, and the next failure doubles the pause

A call's time limit is computed from its bytes and the measured rate. Each call over its limit halves the assumed rate,
so calls to a store that stays slow soon get enough time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Final

import grpc

from antefix.errors import DeadlineExceeded, Unavailable
from antefix.pulse import Pulse, health_question

# Time that a call may take in addition to moving its bytes: a sync of a busy disk, or waiting for other writers.
SLACK_S: Final = 3.0
# A call's limit is this many times the time that its bytes should take.
_FACTOR: Final = 4.0
# The assumed rate until one is measured: a single disk, or a network of 1 Gbit/s at half its speed.
BYTES_PER_S_PRIOR: Final = 50e6
_BYTES_PER_S_MIN: Final = 1e5
# The duration of a call with fewer bytes says little about the transfer rate, so it is not measured.
_BYTES_MIN: Final = 1 << 18
_FADE: Final = 0.9
# A busy machine answers late now and then. A store with this many late answers in a row is too slow.
NUM_LATE_MAX: Final = 2
# gRPC reconnects a broken connection within about a second.
JUST_BACK_S: Final = 2.0
OPEN_S: Final = 5.0
OPEN_S_MAX: Final = 40.0


class Breaker:
    """The breaker of one client.

    num_slow: calls that exceeded their time limit. num_spared: calls that failed at once, so that the store was not
    asked.
    """

    def __init__(self, *, slack_s: float = SLACK_S, clock: Callable[[], float] = time.monotonic) -> None:
        """slack_s: seconds that a call may take in addition to moving its bytes."""
        self._slack_s = slack_s
        self.pulse: Pulse | None = None
        self.num_slow = 0
        self.num_spared = 0
        self._clock = clock
        self._bytes_per_s = BYTES_PER_S_PRIOR
        self._flying_bytes = 0
        self._open_s = OPEN_S
        self._open_until = 0.0
        self._late_s = -math.inf
        self._num_late = 0

    @property
    def num_silences(self) -> int:
        """How many times the store stopped answering."""
        return self.pulse.num_silences if self.pulse is not None else 0

    @property
    def is_just_back(self) -> bool:
        """Whether the store began to answer a moment ago, so some connections to it may not be restored yet."""
        return self._clock() - self.returned_s < JUST_BACK_S

    @property
    def returned_s(self) -> float:
        """When the store last began to answer, for the first time or again, in monotonic seconds."""
        return self.pulse.returned_s if self.pulse is not None else -math.inf

    def follow(self, address: str, channel: grpc.aio.Channel) -> None:
        """Start to poll the store's health."""
        if self.pulse is None:
            self.pulse = Pulse(f"the store at {address}", health_question(channel))
            self.pulse.start()

    async def close(self) -> None:
        pulse, self.pulse = self.pulse, None
        if pulse is not None:
            await pulse.close()

    def limit_s(self, nbytes: int, most_s: float) -> float:
        """The time limit of a call that moves `nbytes` bytes while the calls in flight run too; at most `most_s`."""
        return min(most_s, self._slack_s + _FACTOR * (self._flying_bytes + nbytes) / self._bytes_per_s)

    @contextlib.contextmanager
    def asked(self, nbytes: int = 0) -> Iterator[None]:
        """A context around one call, which moves `nbytes` bytes.

        Raises:  Unavailable: the store is silent, falls silent during the call, or was too slow just now.
        """
        now = self._clock()
        if now < self._open_until and self.returned_s <= self._late_s:
            self.num_spared += 1
            raise Unavailable(f"the store was too slow; the next call to it is made in {self._open_until - now:.0f} s")
        if self.pulse is not None and self.pulse.is_silent:
            self.num_spared += 1
        self._flying_bytes += nbytes
        try:
            with self.pulse.guard() if self.pulse is not None else contextlib.nullcontext():
                yield
        except DeadlineExceeded:
            self._over_time(now)
            raise
        else:
            self._in_time(nbytes, self._clock() - now)
        finally:
            self._flying_bytes -= nbytes

    def _over_time(self, begun: float) -> None:
        self.num_slow += 1
        now = self._clock()
        if begun < self._late_s:
            return  # this call began before the last late call was noticed, so it shows nothing new
        self._late_s = now
        self._num_late += 1
        self._bytes_per_s = max(_BYTES_PER_S_MIN, self._bytes_per_s / 2)
        if self._num_late < NUM_LATE_MAX:
            return
        self._open_until, self._open_s = now + self._open_s, min(OPEN_S_MAX, 2 * self._open_s)

    def _in_time(self, nbytes: int, seconds: float) -> None:
        self._open_s, self._num_late = OPEN_S, 0
        if nbytes >= _BYTES_MIN and seconds > 0:
            self._bytes_per_s = _FADE * self._bytes_per_s + (1 - _FADE) * self._flying_bytes / seconds
