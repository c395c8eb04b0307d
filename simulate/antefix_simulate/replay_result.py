"""The result of a simulated strategy: the numbers that are printed, plotted and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from antefix_simulate.habits import ReasonUse
from antefix_simulate.savings import Savings


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyResult:
    """One strategy over one trace.

    token_hit_rate: share of prompt tokens that the model did not run, neither by prefill nor by replay: a replayed
        token counts as not hit, though it ran through about half of the layers only.
    work_hit_rate: the same, but a replayed token counts by that share (`Sizes.replay_work_tokens`): the share of work
    saved.
    ideal_token_hit_rate: share of tokens in the longest prefix that any earlier request had, in whole units, without
    the
        last token: a store of unlimited size with window state at every boundary. The ideal hit rate does not depend on
        the strategy. share_of_ideal, work_share_of_ideal: token_hit_rate and work_hit_rate divided by
        ideal_token_hit_rate. checkpoints_per_request: checkpoints written per request, to disk or pool. bytes_kept: on
        disk at the end, blocks and checkpoints that have not expired. *_max: the most at any time.
    bytes_written: to disk and pool.
    recomputed_tokens: tokens run again, by prefill or replay, although their global KV was stored at that time.
    replayed_tokens: those of them that a replay ran, from its start to its end.
    ttft_*: of one request alone on the machine, without queueing: loading, replay and prefill.
    dollars: the input tokens' price, hits as in work_hit_rate.
    plan_error: mean of |actual - predicted| / predicted of the planner's choices.
    reasons: how the checkpoints that were left for each reason were used.
    """

    strategy: str
    num_requests: int
    token_hit_rate: float
    work_hit_rate: float
    ideal_token_hit_rate: float
    share_of_ideal: float
    work_share_of_ideal: float
    checkpoints_per_request: float
    bytes_kept: int
    bytes_kept_max: int
    checkpoint_bytes_kept: int
    checkpoint_bytes_kept_max: int
    bytes_written: int
    checkpoint_bytes_written: int
    recomputed_tokens: int
    replayed_tokens: int
    refused: int
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    ttft_mean_s: float
    dollars: float
    plans: dict[str, int]
    plan_error: float
    reasons: dict[str, ReasonUse]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """All strategies over one trace with one size of the store.

    store_ideal_token_hit_rate: the hit rate of the same store if window state took no bytes and were at every boundary.
    savings: of `auto` if it is among the strategies, else of the first one; None: not requested.
    """

    trace: str
    num_requests: int
    prompt_tokens: int
    unit_tokens: int
    model: str
    store_bytes: int | None
    store_ideal_token_hit_rate: float
    results: tuple[StrategyResult, ...]
    savings: Savings | None = None

    def as_dict(self) -> dict[str, Any]:
        shared = {
            name: getattr(self, name)
            for name in (
                "trace",
                "num_requests",
                "prompt_tokens",
                "unit_tokens",
                "model",
                "store_bytes",
                "store_ideal_token_hit_rate",
            )
        }
        if self.savings is not None:
            shared["savings"] = self.savings.as_dict()
        return shared | {"strategies": {result.strategy: result.as_dict() for result in self.results}}


def percentile(values: Sequence[float], share: float) -> float:
    """A percentile, interpolated between neighbours; 0 for no values."""
    return float(np.quantile(np.asarray(values), share)) if values else 0.0
