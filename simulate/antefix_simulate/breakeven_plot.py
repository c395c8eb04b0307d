"""Plots the break-even table: the best strategy for each case, and its advantage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antefix.errors import InvalidRequest
from antefix_simulate.breakeven import STRATEGIES, BreakEven, PointOutcome, human_age
from antefix_simulate.plot import check_path, load_pyplot

NOTHING = "none"
COLORS = {
    "zero": "#8da0cb",
    "boundary": "#fc8d62",
    "auto": "#66c2a5",
    "periodic(8192)": "#e78ac3",
    "periodic(2048)": "#a6d854",
    "full": "#ffd92f",
    NOTHING: "#eeeeee",
}
CASES = (("continue", "next turn"), ("leave", "left inside"))


def plot_break_even(rows: Sequence[BreakEven], path: Path) -> None:
    """Write the plot to `path` (.svg or .png).

    The upper part has one map per disk speed and case: for each prefix length and reuse age, the strategy that saves
    most seconds against a cold run per stored GB, and those seconds. The lower part has every strategy's savings by
    prefix length.
    Raises:  InvalidRequest: matplotlib is not installed, the suffix is another, or there is nothing to plot.
    """
    check_path(path)
    if not rows:
        raise InvalidRequest("there is nothing to plot")
    pyplot = load_pyplot()
    disks = sorted({row.disk_bytes_per_s for row in rows})
    figure = pyplot.figure(figsize=(3.6 * len(disks), 11), layout="constrained")
    try:
        maps, lines = figure.subfigures(2, 1, height_ratios=(2, 1.25))
        axes = maps.subplots(2, len(disks), sharex=True, sharey=True, squeeze=False)
        for column, disk in enumerate(disks):
            for line, (case, label) in enumerate(CASES):
                here = [row for row in rows if row.disk_bytes_per_s == disk]
                _map(axes[line][column], here, case)
                axes[line][column].set_title(f"{label}, disk {_human_speed(disk)}", fontsize=10)
        maps.suptitle("most seconds saved per stored GB: which strategy, and how many seconds")
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in COLORS]
        maps.legend(handles, list(COLORS), loc="outside lower center", ncols=len(COLORS), frameon=False)
        _lines(lines, rows, disks[-1])
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    finally:
        pyplot.close(figure)


def saved_per_gb(outcome: PointOutcome, case: str) -> float:
    """Seconds saved against a cold run, per stored GB."""
    saved: float = getattr(outcome, f"{case}_saved_s")
    return saved / max(outcome.stored_bytes, 1) * 1e9


def _map(axis: Any, rows: Sequence[BreakEven], case: str) -> None:
    prefixes = sorted({row.prefix_tokens for row in rows})
    ages = sorted({row.age_s for row in rows})
    for row in rows:
        x, y = prefixes.index(row.prefix_tokens), ages.index(row.age_s)
        name = getattr(row, f"{case}_per_byte")
        axis.add_patch(_cell(x, y, COLORS[name]))
        best = max(saved_per_gb(outcome, case) for outcome in row.outcomes)
        if name != NOTHING:
            axis.text(x, y, f"{best:.1f}", ha="center", va="center", fontsize=8)
    axis.set_xlim(-0.5, len(prefixes) - 0.5)
    axis.set_ylim(-0.5, len(ages) - 0.5)
    axis.set_xticks(range(len(prefixes)), [_human_tokens(tokens) for tokens in prefixes])
    axis.set_yticks(range(len(ages)), [human_age(age) for age in ages])
    axis.tick_params(length=0)
    if axis.get_subplotspec().is_last_row():
        axis.set_xlabel("prefix, tokens")
    if axis.get_subplotspec().is_first_col():
        axis.set_ylabel("reuse age")


def _cell(x: int, y: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5)


def _lines(figure: Any, rows: Sequence[BreakEven], disk: float) -> None:
    ages = sorted({row.age_s for row in rows})
    shown = [ages[0], ages[min(2, len(ages) - 1)]]
    axes = figure.subplots(1, 2 * len(CASES), sharey=True)
    panels = [(case, label, age) for case, label in CASES for age in dict.fromkeys(shown)]
    for axis, (case, label, age) in zip(axes, panels, strict=False):
        here = sorted((r for r in rows if r.disk_bytes_per_s == disk and r.age_s == age), key=lambda r: r.prefix_tokens)
        for index, name in enumerate(STRATEGIES):
            values = [saved_per_gb(row.outcomes[index], case) for row in here]
            positions = range(len(here))
            axis.plot(positions, values, marker="o", markersize=4, linewidth=2, color=COLORS[name], label=name)
        axis.set_xticks(range(len(here)), [_human_tokens(row.prefix_tokens) for row in here])
        axis.set_title(f"{label}, after {human_age(age)}", fontsize=10)
        axis.set_xlabel("prefix, tokens")
        axis.grid(axis="y", linewidth=0.3)
    axes[0].set_ylabel("seconds saved per stored GB")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"every strategy, disk {_human_speed(disk)}")


def _human_tokens(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens < 1 << 20 else f"{tokens >> 20}M"


def _human_speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:g} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:g} MB/s"
