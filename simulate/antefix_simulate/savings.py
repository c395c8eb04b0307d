"""The savings that a cache would have given on a trace: hit rates, and the bill without and with a cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from antefix_simulate.machine import TokenPrices
from antefix_simulate.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Savings:
    """Costs are in dollars: of all prompts, and of prompts and answers.

    unit_tokens: the trace's resolution: shared prefixes are known in whole units, rounded down.
    own_hit_rate: share of prompt tokens, at that resolution, with a store of unlimited size.
    hit_rate: share of prompt tokens, in the model's blocks and this store, by `strategy`; replayed tokens by their
    work.
    reported_hit_rate: share that the log's own provider read from a cache, by the log; None: not logged.
    """

    strategy: str
    unit_tokens: int
    own_hit_rate: float
    block_tokens: int
    hit_rate: float
    reported_hit_rate: float | None
    prompt_cost: float
    prompt_cost_cached: float
    output_cost: float

    @property
    def saved(self) -> float:
        """Share of the prompts' cost that is saved."""
        return 1 - self.prompt_cost_cached / self.prompt_cost if self.prompt_cost else 0.0

    @property
    def saved_of_all(self) -> float:
        """Share of the whole bill that is saved, answers included."""
        whole = self.prompt_cost + self.output_cost
        return (self.prompt_cost - self.prompt_cost_cached) / whole if whole else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"saved": self.saved, "saved_of_all": self.saved_of_all}


def savings_of(
    trace: Trace, own: Trace, *, own_hit_tokens: int, hit_rate: float, strategy: str, prices: TokenPrices
) -> Savings:
    """trace: in the model's blocks.  own: the same trace at its own resolution.  hit_rate: of the strategy on
    `trace`.
    """
    tokens = trace.num_tokens
    hits = round(tokens * hit_rate)
    return Savings(
        strategy=strategy,
        unit_tokens=own.unit_tokens,
        own_hit_rate=own_hit_tokens / max(tokens, 1),
        block_tokens=trace.unit_tokens,
        hit_rate=hit_rate,
        reported_hit_rate=_reported(trace),
        prompt_cost=prices.dollars(hit_tokens=0, miss_tokens=tokens),
        prompt_cost_cached=prices.dollars(hit_tokens=hits, miss_tokens=tokens - hits),
        output_cost=sum(request.output_tokens for request in trace.requests) * prices.output / 1e6,
    )


def savings_text(savings: Savings) -> str:
    """A summary of the savings in at most four lines."""
    lines = [
        f"hit rate: {savings.own_hit_rate:.2%} at the trace's own resolution of {savings.unit_tokens} tokens, "
        f"{savings.hit_rate:.2%} in units of {savings.block_tokens} with strategy {savings.strategy}",
    ]
    if savings.reported_hit_rate is not None:
        lines.append(f"the log's own provider took {savings.reported_hit_rate:.2%} from its cache")
    lines.append(
        f"prompts: {_dollars(savings.prompt_cost)} without a cache, {_dollars(savings.prompt_cost_cached)} with it: "
        f"{savings.saved:.1%} saved"
    )
    if savings.output_cost:
        whole = savings.prompt_cost + savings.output_cost
        cached = savings.prompt_cost_cached + savings.output_cost
        lines.append(
            f"with answers: {_dollars(whole)} without, {_dollars(cached)} with it: {savings.saved_of_all:.1%} saved"
        )
    return "\n".join(lines)


def _reported(trace: Trace) -> float | None:
    known = [request for request in trace.requests if request.cached_tokens is not None]
    tokens = sum(request.num_tokens for request in known)
    return sum(request.cached_tokens or 0 for request in known) / tokens if tokens else None


def _dollars(amount: float) -> str:
    """Dollars with three significant digits, because small logs cost fractions of a cent."""
    return f"${amount:,.2f}" if amount >= 10 else f"${amount:.3g}"
