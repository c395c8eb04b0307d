"""A plan for buying machines as text, and a plot of plans for growing load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from antefix.text_table import text_table
from antefix_simulate.plan.sizing import ASSUMPTIONS, Plan
from antefix_simulate.plot import check_path, load_pyplot


def plan_text(plan: Plan, sources: Sequence[str]) -> str:
    """Heading, the machines needed, the limiting resource, and the assumptions."""
    heading = (
        f"{plan.tokens_per_day:.3g} tokens per day, hit rate {plan.hit_rate:.2%}, first token within "
        f"{plan.ttft_p90_s:.3f} s for 90 of 100 (bound)"
    )
    head = ["what", "number", "used", "because of", "one more gives", "$ per month"]
    rows = [
        [need.name, f"{need.number:,}", f"{need.use:.0%}", need.why, need.more, f"{need.dollars_per_month:,.0f}"]
        for need in plan.needs
    ]
    money = (
        f"${plan.dollars_per_month:,.0f} per month, ${plan.dollars_per_million_tokens:.4g} per million tokens; the"
        f" limit is {plan.binds}, {plan.bound_share:.0%} of the cost"
    )
    rests = "\n".join(f"  - {line}" for line in (*sources, *ASSUMPTIONS))
    return f"{heading}\n{text_table(head, rows)}\n{money}\nIt rests on:\n{rests}"


def plot_plans(plans: Sequence[Plan], path: Path, title: str) -> None:
    """Machines and dollars over tokens per day. Raises: InvalidRequest: as `check_path`, or matplotlib is not
    installed.
    """
    check_path(path)
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    try:
        at = [plan.tokens_per_day for plan in plans]
        names = list(dict.fromkeys(need.name for plan in plans for need in plan.needs))
        for name in names:
            numbers = [next((need.number for need in plan.needs if need.name == name), 0) for plan in plans]
            left.plot(at, numbers, marker="o", markersize=3, label=name)
        left.set_ylabel("number")
        left.legend()
        right.plot(at, [plan.dollars_per_million_tokens for plan in plans], marker="o", markersize=3)
        right.set_ylabel("dollars per million tokens")
        for axis in (left, right):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("tokens per day, prompts and answers")
        figure.suptitle(title)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    finally:
        pyplot.close(figure)
