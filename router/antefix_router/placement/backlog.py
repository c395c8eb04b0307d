"""The unfinished work of one worker, in tokens of prefill, and the worker's measured speed.

A worker computes one prompt after the other, so the remaining work of the first prompt shrinks over time. Without this
estimate, a worker that is nearly done would look like a worker that has just begun.

The speed is that of a busy worker: the work of the prompts that ended, whichever was placed first, over the time since
the one before ended. A worker computes the short rests of several prompts in one call, so they end at the same moment.
Each alone would look endlessly fast, so times are averaged and not speeds.
"""

from __future__ import annotations

from dataclasses import dataclass

# A measurement counts half after 14 later requests.
_MEMORY = 0.95
# Less work measures the call rather than the computation.
_TOKENS_MIN = 256.0
# One measurement counts as at most so many times the usual time, so that a worker that hung is not slow for ever.
_SLOWER_MAX = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogState:
    """The values from which `pending_tokens` is computed, for a caller that compares many workers at once."""

    total_tokens: float
    head_tokens: float
    head_since: float
    tokens_per_s: float


class Backlog:
    """Tickets in order of placement. Times are seconds of any steady clock, and are passed in by the caller."""

    def __init__(self, tokens_per_s: float = 0.0) -> None:
        self.tokens_per_s = tokens_per_s
        self._waiting: dict[int, float] = {}
        self._head_since = 0.0
        # The work that has ended since then is not measured yet.
        self._measured_at = 0.0
        self._ended = 0.0
        self._total = 0.0
        self._next = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, tokens: float, now: float) -> int:
        """Add the work of a request that was placed on the worker. Returns its ticket."""
        if not self._waiting:
            self._head_since = self._measured_at = now
            self._ended = 0.0
        self._next += 1
        self._waiting[self._next] = tokens
        self._total += tokens
        return self._next

    def remove(self, ticket: int, now: float, *, done: bool) -> None:
        """Remove the work of an ended request. done: whether it was computed completely, so that its time measures the
        worker's speed.
        """
        was_head = next(iter(self._waiting)) == ticket
        tokens = self._waiting.pop(ticket)
        self._total = self._total - tokens if self._waiting else 0.0
        if done:
            self._measure(tokens, now)
        elif was_head:
            # Nobody knows how much of it was computed.
            self._measured_at, self._ended = now, 0.0
        if was_head:
            self._head_since = now

    def _measure(self, tokens: float, now: float) -> None:
        self._ended += tokens
        if self._ended < _TOKENS_MIN or now <= self._measured_at:
            return
        each_s = (now - self._measured_at) / self._ended
        if self.tokens_per_s:
            usual_s = 1 / self.tokens_per_s
            each_s = _MEMORY * usual_s + (1 - _MEMORY) * min(each_s, _SLOWER_MAX * usual_s)
        self.tokens_per_s, self._measured_at, self._ended = 1 / each_s, now, 0.0

    @property
    def state(self) -> BacklogState:
        return BacklogState(
            total_tokens=self._total,
            head_tokens=next(iter(self._waiting.values()), 0.0),
            head_since=self._head_since,
            tokens_per_s=self.tokens_per_s,
        )

    def pending_tokens(self, now: float) -> float:
        """The remaining work. The amount is read for every worker at every placement, so reading it allocates no
        objects.
        """
        if not self._waiting:
            return 0.0
        done = max(0.0, now - self._head_since) * self.tokens_per_s
        return self._total - min(next(iter(self._waiting.values())), done)
