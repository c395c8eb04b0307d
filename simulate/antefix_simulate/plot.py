"""Plots of simulations. Plots are optional and need matplotlib; table and JSON have the same numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antefix.errors import InvalidRequest
from antefix.extras import needs
from antefix_simulate.replay_result import Simulation

SUFFIXES = (".svg", ".png")


def plot(simulations: Sequence[Simulation], path: Path) -> None:
    """Write a plot of the simulations to `path` (.svg or .png).

    For one store size: bytes against hits of each strategy. For several: hit rate by store size, a line per strategy.
    Raises:  InvalidRequest: matplotlib is not installed, another suffix, or nothing to plot.
    """
    check_path(path)
    if not simulations or not simulations[0].results:
        raise InvalidRequest("there is nothing to plot")
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    try:
        if len(simulations) == 1:
            _bars(axes, simulations[0])
        else:
            _lines(axes, simulations)
        first = simulations[0]
        figure.suptitle(f"{first.trace}, {first.model}: {first.num_requests} requests")
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    finally:
        pyplot.close(figure)


def check_path(path: Path) -> None:
    """Check a plot's path before a long simulation, so that the simulation is not wasted.

    Raises:  InvalidRequest: the suffix is another, or the directory does not exist.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidRequest(f"cannot plot to {path.name}: use one of {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InvalidRequest(f"cannot plot to {path}: there is no directory {path.parent}")


def load_pyplot() -> Any:
    """matplotlib.pyplot with a backend that works without a screen.

    Raises:  InvalidRequest: it is not installed; the message says how to get it.
    """
    try:
        import matplotlib
    except ImportError as err:
        raise InvalidRequest(f"{needs('--plot', 'matplotlib', 'plots')}, or leave out --plot") from err
    # At its first plot, matplotlib logs about its font cache, which does not interest the user.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    matplotlib.use("Agg")
    # Text stays text and ids depend on content, so that files are small and change only with the figures.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "antefix"
    import matplotlib.pyplot as pyplot

    return pyplot


def _bars(axes: Any, simulation: Simulation) -> None:
    results = simulation.results
    names = [result.strategy for result in results]
    hits = [100 * result.token_hit_rate for result in results]
    spared = [100 * result.work_hit_rate - hit for result, hit in zip(results, hits, strict=True)]
    axes[0].barh(names, hits, color="tab:blue", label="tokens not run again")
    axes[0].barh(names, spared, left=hits, color="tab:blue", alpha=0.35, label="work spared in replayed tokens")
    axes[0].axvline(100 * results[0].ideal_token_hit_rate, color="black", linestyle="--", label="ideal")
    axes[0].set_xlim(0, 105 * results[0].ideal_token_hit_rate or 1)
    axes[0].set_xlabel("of prompt tokens, %")
    # Below the bars, because inside it would hide them.
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize="small")
    # Next to each other, not stacked, because the two maxima need not occur at the same time.
    rows = range(len(names))
    kept = [result.bytes_kept_max / 1e9 for result in results]
    axes[1].barh([row - 0.2 for row in rows], kept, height=0.4, color="tab:gray", label="blocks and checkpoints")
    windows = [result.checkpoint_bytes_kept_max / 1e9 for result in results]
    axes[1].barh([row + 0.2 for row in rows], windows, height=0.4, color="tab:orange", label="checkpoints alone")
    axes[1].set_yticks(rows, names)
    axes[1].set_xlabel("kept at most, GB")
    axes[1].legend()
    for axis in axes:
        axis.invert_yaxis()


def _lines(axes: Any, simulations: Sequence[Simulation]) -> None:
    bounded = sorted((s for s in simulations if s.store_bytes is not None), key=lambda s: s.store_bytes or 0)
    sizes = [(s.store_bytes or 0) / 1e9 for s in bounded]
    for index, result in enumerate(bounded[0].results):
        rows = [s.results[index] for s in bounded]
        # The first strategy is drawn on top with the smallest marker, so that equal strategies can both be seen.
        look = {"marker": "o", "markersize": 4 + index, "zorder": 10 - index, "label": result.strategy}
        axes[0].plot(sizes, [100 * row.token_hit_rate for row in rows], **look)
        axes[1].plot(sizes, [row.ttft_mean_s for row in rows], **look)
    axes[0].axhline(100 * bounded[0].results[0].ideal_token_hit_rate, color="black", linestyle="--", label="ideal")
    axes[0].set_ylabel("prompt tokens not run again, %")
    axes[1].set_ylabel("mean time to first token, s")
    for axis in axes:
        axis.set_xlabel("store, GB")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    # Next to the plot, because inside it would hide lines.
    axes[1].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
