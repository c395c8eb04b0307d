"""Plots a replay: times to first token over time, and their distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from antefix_console.load.replay import Sent
from antefix_simulate.plot import check_path, load_pyplot


def plot_load(sent: Sequence[Sent], path: Path, title: str) -> None:
    """Raises:  InvalidRequest: matplotlib is not installed, or the suffix is neither .svg nor .png."""
    check_path(path)
    pyplot = load_pyplot()
    from matplotlib import ticker

    good = [each for each in sent if each.reply.ok and each.reply.ttft_s]
    hits = [each for each in good if each.reply.usage.cached_tokens]
    misses = [each for each in good if not each.reply.usage.cached_tokens]
    figure, (over_time, shares) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    try:
        for label, some in (("with hit tokens", hits), ("without", misses)):
            if not some:
                continue
            times_ms = [1e3 * each.reply.ttft_s for each in some]
            over_time.scatter([each.at_s for each in some], times_ms, s=12, label=f"{label} ({len(some)})")
            shares.step(
                np.sort(times_ms), np.arange(1, len(some) + 1) / len(some), where="post", label=label, marker="."
            )
        over_time.set(xlabel="sent at, seconds", ylabel="time to first token, ms (lower is better)", yscale="log")
        shares.set(xlabel="time to first token, ms (lower is better)", ylabel="share of requests", xscale="log")
        for axis in (over_time.yaxis, shares.xaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(ticker.NullLocator())
        if good:
            over_time.legend()
            shares.legend()
        figure.suptitle(title)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    finally:
        pyplot.close(figure)
