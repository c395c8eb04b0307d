"""Shows the results of `break_even_services.py` as a table for docs/results/window_state.md and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from antefix_simulate.breakeven_plot import COLORS
from antefix_simulate.plot import load_pyplot

BEGIN, END = "<!-- break-even services -->", "<!-- end of break-even services -->"


def table(found: dict[str, Any]) -> list[str]:
    """Markdown table: a heading line, then one row per case, strategy and length."""
    machine = found["machine"]
    half = machine["context_half_tokens"]
    growth = f", half as fast at {half / 1000:.0f}K of context" if half < 1e8 else ""
    lines = [
        f"Fitted to the cold runs: {machine['prefill_fixed_s'] * 1e3:.0f} ms and"
        f" {machine['prefill_tokens_per_s']:,.0f} tokens/s{growth}; disk {machine['disk_bytes_per_s'] / 1e9:.1f} GB/s;"
        f" medians of {found['repeats']}.",
        "",
        "| prompt | case | strategy | plan | tokens run | measured (restore, compute) | simulated | ratio |"
        " saved a stored GB | simulated |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    before: tuple[Any, ...] = ()
    for row in found["rows"]:
        here = row["tokens"], row["case"]
        first = (f"{row['tokens']:,}", row["case"]) if here != before else ("", "")
        before = here
        plans = " or ".join(row["plans"])
        if row["plans"] != [row["simulated_plan"]]:
            plans += f" (simulated: {row['simulated_plan']})"
        cells = [
            *first,
            f"`{row['strategy']}`",
            plans,
            f"{row['run_tokens']:.0f}",
            f"{_ms(row['ttft_s'])} ms ({_ms(row['restore_s'])}, {_ms(row['compute_s'])})",
            f"{_ms(row['simulated_ttft_s'])} ms",
            f"{row['ttft_s'] / row['simulated_ttft_s']:.2f}",
            f"{saved_per_gb(row):.0f} s",
            f"{simulated_saved_per_gb(row):.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def saved_per_gb(row: dict[str, Any]) -> float:
    """Seconds saved compared with a cold run of the same prompt, per stored GB."""
    return float((row["cold_s"] - row["ttft_s"]) / row["stored_bytes"] * 1e9)


def simulated_saved_per_gb(row: dict[str, Any]) -> float:
    return float((row["cold_s"] - row["simulated_ttft_s"]) / row["simulated_bytes"] * 1e9)


def write_table(found: dict[str, Any], document: Path) -> None:
    """Replace the text between the document's two marks.  Raises:  ValueError: the document has no marks."""
    text = document.read_text()
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    document.write_text(text[:start] + "\n" + "\n".join(table(found)) + "\n" + text[stop:])


def plot_services(found: dict[str, Any], path: Path) -> None:
    """Plot measured and simulated time to first token, and seconds saved per stored GB, for each prompt length."""
    pyplot = load_pyplot()
    lengths = list(dict.fromkeys(row["tokens"] for row in found["rows"]))
    cases = list(dict.fromkeys(row["case"] for row in found["rows"]))
    figure, axes = pyplot.subplots(
        2 * len(cases), len(lengths), figsize=(3.6 * len(lengths), 9.5), layout="constrained", squeeze=False
    )
    try:
        for column, length in enumerate(lengths):
            for line, case in enumerate(cases):
                rows = [row for row in found["rows"] if (row["tokens"], row["case"]) == (length, case)]
                seconds, saved = axes[line][column], axes[len(cases) + line][column]
                _bars(seconds, rows, [row["ttft_s"] for row in rows], [row["simulated_ttft_s"] for row in rows])
                seconds.axhline(rows[0]["cold_s"], color="black", linestyle="--", linewidth=1)
                seconds.set_title(f"{case}, {length:,} tokens", fontsize=10)
                _bars(saved, rows, [saved_per_gb(row) for row in rows], [simulated_saved_per_gb(row) for row in rows])
                saved.set_title(f"{case}, {length:,} tokens", fontsize=10)
                if column == 0:
                    seconds.set_ylabel("s to first token\n(dashed: cold)")
                    saved.set_ylabel("s saved a stored GB")
        figure.suptitle("left bar: measured, right bar (pale): simulated")
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    finally:
        pyplot.close(figure)


def _bars(axis: Any, rows: list[dict[str, Any]], measured: list[float], simulated: list[float]) -> None:
    colors = [COLORS[row["strategy"]] for row in rows]
    places = range(len(rows))
    axis.bar([place - 0.2 for place in places], measured, width=0.38, color=colors)
    axis.bar([place + 0.2 for place in places], simulated, width=0.38, color=colors, alpha=0.45)
    axis.set_xticks(places, [row["strategy"] for row in rows], fontsize=8)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.grid(axis="y", linewidth=0.3)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"
