"""The demand of a trace per second: tokens to compute, bytes to read and write, bytes to keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antefix.errors import InvalidRequest
from antefix.window import Sizes
from antefix_simulate.trace import Trace

DAY_S = 86_400.0
# The trace is cut into so many parts, and the busiest part's load must be served.
_PARTS = 24
# With fewer requests per part, the rate of a part would be meaningless.
_REQUESTS_PER_PART_MIN = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The demand of one trace, at one retention and one multiple of its rate.

    requests_per_s, prompt_tokens_per_s, output_tokens_per_s: averages.  peak: the busiest part's rate over the average.
    hit_rate: share of prompt tokens, if KV is dropped when it was not used for the retention time.
    missed_tokens, hit_tokens: of each request.  context_tokens: average context at the end of a request.
    new_tokens_per_s: tokens stored for the first time, or again.
    life_s: average time that a token stays stored: from its first use until the retention time after its last use.
    span_s: the trace's length in time.
    """

    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    peak: float
    hit_rate: float
    missed_tokens: npt.NDArray[np.int64]
    hit_tokens: npt.NDArray[np.int64]
    context_tokens: float
    new_tokens_per_s: float
    life_s: float
    span_s: float

    def kept_bytes(self, sizes: Sizes, checkpoint_share: float) -> float:
        """Bytes on disk in the steady state: the write rate times the lifetime. checkpoint_share: checkpoints per
        request.
        """
        blocks = self.new_tokens_per_s * self.life_s / sizes.block_size * sizes.block_bytes
        return blocks + self.requests_per_s * checkpoint_share * self.life_s * sizes.checkpoint_bytes

    def scaled(self, factor: float) -> Demand:
        """The demand of `factor` times as many users with the same requests, who share nothing with each other."""
        return Demand(
            requests_per_s=self.requests_per_s * factor,
            prompt_tokens_per_s=self.prompt_tokens_per_s * factor,
            output_tokens_per_s=self.output_tokens_per_s * factor,
            peak=self.peak,
            hit_rate=self.hit_rate,
            missed_tokens=self.missed_tokens,
            hit_tokens=self.hit_tokens,
            context_tokens=self.context_tokens,
            new_tokens_per_s=self.new_tokens_per_s * factor,
            life_s=self.life_s,
            span_s=self.span_s,
        )


def demand_of(trace: Trace, *, retention_s: float) -> Demand:
    """Raises:  InvalidRequest: all requests have the same time, so there is no rate."""
    times = np.asarray([request.at_s for request in trace.requests])
    tokens = np.asarray([request.num_tokens for request in trace.requests], dtype=np.int64)
    outputs = np.asarray([request.output_tokens for request in trace.requests], dtype=np.int64)
    span_s = float(times[-1] - times[0])
    if span_s <= 0:
        raise InvalidRequest(
            f"the trace {trace.name} has no times of its requests, so its rate is not known and nothing can be "
            "planned for it"
        )
    # 1. Hits, and the lifetime of each unit.
    hits = np.zeros(len(times), dtype=np.int64)
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    new_units, lived_s = 0, 0.0
    for index, request in enumerate(trace.requests):
        names, now_s = request.names.tolist(), request.at_s
        alive = True
        for number, name in enumerate(names):
            used_s = last.get(name)
            alive = alive and used_s is not None and now_s - used_s <= retention_s
            if alive:
                hits[index] = (number + 1) * trace.unit_tokens
            elif used_s is None or now_s - used_s > retention_s:
                if used_s is not None:
                    lived_s += used_s - first[name]
                first[name] = now_s
                new_units += 1
            last[name] = now_s
    hits = np.minimum(hits, np.maximum(tokens - 1, 0))
    lived_s += sum(last[name] - first[name] for name in last)
    # 2. Rates.
    num_parts = max(1, min(_PARTS, len(times) // _REQUESTS_PER_PART_MIN))
    missed = tokens - hits
    sums, _ = np.histogram(times, np.linspace(times[0], times[-1] + 1e-9, num_parts + 1), weights=missed)
    return Demand(
        requests_per_s=len(times) / span_s,
        prompt_tokens_per_s=float(tokens.sum()) / span_s,
        output_tokens_per_s=float(outputs.sum()) / span_s,
        peak=float(sums.max() / max(sums.mean(), 1e-9)),
        hit_rate=float(hits.sum()) / float(tokens.sum()),
        missed_tokens=missed,
        hit_tokens=hits,
        context_tokens=float((tokens + outputs).mean()),
        new_tokens_per_s=new_units * trace.unit_tokens / span_s,
        life_s=(lived_s / new_units if new_units else 0.0) + retention_s,
        span_s=span_s,
    )
