"""A picture of what a cache would save on a trace: prompt tokens over time, hit and computed, and the bill."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from antefix_simulate.plot import check_path, load_pyplot
from antefix_simulate.savings import Savings
from antefix_simulate.trace import Trace
from antefix_simulate.trace_replay import ideal_hits

_BINS = 60


def plot_savings(savings: Savings, own: Trace, path: Path, *, model: str) -> None:
    """own: the trace at its own resolution, before it is cut into blocks. Raises: InvalidRequest: as `check_path`, or
    matplotlib is not installed.
    """
    check_path(path)
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 2), layout="constrained")
    try:
        # 1. Tokens over time.
        times = np.asarray([request.at_s for request in own.requests])
        hits = np.fromiter(ideal_hits(own), dtype=np.int64, count=len(times))
        tokens = np.asarray([request.num_tokens for request in own.requests])
        span = max(float(times[-1] - times[0]), 1e-9)
        unit, seconds = next(
            (u for u in (("days", 86400), ("hours", 3600), ("minutes", 60)) if span > 3 * u[1]), ("s", 1)
        )
        edges = np.linspace(times[0], times[-1] + 1e-9, _BINS + 1)
        hit_sums, _ = np.histogram(times, edges, weights=hits)
        sums, _ = np.histogram(times, edges, weights=tokens)
        at, width = (edges[:-1] - times[0]) / seconds, (edges[1] - edges[0]) / seconds
        left.bar(at, hit_sums / 1e6, width, align="edge", color="tab:blue", label="hit")
        left.bar(
            at, (sums - hit_sums) / 1e6, width, bottom=hit_sums / 1e6, align="edge", color="tab:gray", label="computed"
        )
        left.set_xlabel(f"time, {unit}")
        left.set_ylabel("prompt tokens, million")
        left.set_title(f"{savings.own_hit_rate:.1%} hit, in units of {savings.unit_tokens} tokens, endless store")
        left.legend()
        # 2. The bill.
        names = ["without a cache", f"with it ({savings.strategy})"]
        prompts = [savings.prompt_cost, savings.prompt_cost_cached]
        right.bar(names, prompts, color=["tab:gray", "tab:blue"], label="prompts")
        if savings.output_cost:
            right.bar(names, [savings.output_cost] * 2, bottom=prompts, color="tab:orange", alpha=0.5, label="answers")
        right.set_ylabel("dollars")
        right.set_title(f"{savings.saved:.1%} of the prompts' cost saved")
        right.legend()
        figure.suptitle(f"{own.name}, {model}: {len(own.requests)} requests")
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    finally:
        pyplot.close(figure)
