"""Generated traces: seeded, of any size, shaped like real ones. Generated traces are for tests, and for users who have
no trace.

chat       conversations that share a system prompt; sometimes a user rewrites a turn (a fork).
agents     long conversations in small steps, a few minutes apart; sometimes one restarts from its preamble.
documents  a few questions on each of many long documents, interleaved.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from antefix.errors import InvalidRequest
from antefix_simulate.trace import Trace, TraceRequest

REQUESTS_MAX = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Mean lengths in tokens and mean gaps in seconds; each value is drawn from an exponential distribution."""

    preamble_tokens: int
    shared_preamble: bool
    first_tokens: int
    step_tokens: int
    output_tokens: int
    turns: int
    gap_s: float
    sessions_per_s: float
    rewind_chance: float
    branches: bool


SHAPES = {
    "chat": Shape(
        preamble_tokens=512,
        shared_preamble=True,
        first_tokens=6_000,
        step_tokens=600,
        output_tokens=350,
        turns=3,
        gap_s=120,
        sessions_per_s=1.0,
        rewind_chance=0.05,
        branches=False,
    ),
    "agents": Shape(
        preamble_tokens=15_000,
        shared_preamble=True,
        first_tokens=2_000,
        step_tokens=2_500,
        output_tokens=400,
        turns=60,
        gap_s=40,
        sessions_per_s=0.02,
        rewind_chance=0.01,
        branches=False,
    ),
    "documents": Shape(
        preamble_tokens=0,
        shared_preamble=False,
        first_tokens=30_000,
        step_tokens=400,
        output_tokens=150,
        turns=4,
        gap_s=60,
        sessions_per_s=0.5,
        rewind_chance=0.0,
        branches=True,
    ),
}


def generate(shape_name: str, *, num_requests: int, unit_tokens: int, seed: int = 0) -> Trace:
    """A trace of the named shape with this many requests.

    Raises:  InvalidRequest: an unknown shape, or a number of requests that is not in [1, REQUESTS_MAX].
    """
    if shape_name not in SHAPES:
        raise InvalidRequest(f"there is no shape {shape_name!r} of generated traces; use one of {', '.join(SHAPES)}")
    if not 1 <= num_requests <= REQUESTS_MAX:
        raise InvalidRequest(f"the number of requests must be in [1, {REQUESTS_MAX}], is {num_requests}")
    shape, rng = SHAPES[shape_name], random.Random(seed)
    fresh = itertools.count()
    preamble = [next(fresh) for _ in range(shape.preamble_tokens // unit_tokens)] if shape.shared_preamble else []
    requests: list[TraceRequest] = []
    start_s = 0.0
    while len(requests) < num_requests:
        start_s += rng.expovariate(shape.sessions_per_s)
        session = _Session(shape, rng, unit_tokens, lambda: next(fresh), preamble)
        requests.extend(session.requests(f"s{len(requests)}", start_s))
    # Cut by time, not by session; otherwise the trace would end with the tails of long sessions only.
    requests.sort(key=lambda request: request.at_s)
    return Trace(name=f"generated {shape_name}", unit_tokens=unit_tokens, requests=tuple(requests[:num_requests]))


class _Session:
    """One conversation: the names of its complete units so far, and its number of tokens."""

    def __init__(
        self, shape: Shape, rng: random.Random, unit_tokens: int, fresh: Callable[[], int], preamble: list[int]
    ) -> None:
        self.shape = shape
        self.rng = rng
        self.unit_tokens = unit_tokens
        self.fresh = fresh
        self.names = list(preamble)
        self.num_tokens = len(preamble) * unit_tokens

    def requests(self, name: str, start_s: float) -> Iterator[TraceRequest]:
        at_s = start_s
        base = self._grow(self.shape.first_tokens)
        for _ in range(1 + int(self.rng.expovariate(1 / self.shape.turns))):
            output_tokens = 1 + int(self.rng.expovariate(1 / self.shape.output_tokens))
            yield TraceRequest(
                at_s=at_s,
                num_tokens=self.num_tokens,
                output_tokens=output_tokens,
                names=np.asarray(self.names, dtype=np.int64),
                session=name,
            )
            at_s += self.rng.expovariate(1 / self.shape.gap_s)
            if self.shape.branches:
                self._rewind(base)
                self._grow(self.shape.step_tokens)
            else:
                if self.rng.random() < self.shape.rewind_chance:
                    self._rewind(int(self.rng.uniform(0, self.num_tokens)))
                self._grow(output_tokens + self.shape.step_tokens)

    def _grow(self, mean_tokens: int) -> int:
        self.num_tokens += 1 + int(self.rng.expovariate(1 / mean_tokens))
        while (len(self.names) + 1) * self.unit_tokens <= self.num_tokens:
            self.names.append(self.fresh())
        return self.num_tokens

    def _rewind(self, num_tokens: int) -> None:
        """Go back to the first `num_tokens` tokens of the conversation; the tokens after them will be new."""
        self.num_tokens = max(num_tokens, 1)
        del self.names[self.num_tokens // self.unit_tokens :]
