"""The statistical tests of an audit, by scipy. Each test returns a p-value: a small one means that the difference is
not by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from antefix.errors import InvalidRequest
from antefix.extras import needs

# As in arXiv 2502.07776. It is small because an audit makes many comparisons, and must not accuse by chance.
ALPHA = 1e-8


def hits_are_faster(hit_s: Sequence[float], miss_s: Sequence[float]) -> float:
    """One-sided two-sample Kolmogorov-Smirnov test: are the times of hits smaller than those of misses?"""
    return float(_stats().ks_2samp(hit_s, miss_s, alternative="greater").pvalue)


def happens_more_often(times: int, of: int, control_times: int, control_of: int) -> float:
    """One-sided Fisher's exact test: is the event more frequent here than in the control?"""
    table = [[times, of - times], [control_times, control_of - control_times]]
    return float(_stats().fisher_exact(table, alternative="greater").pvalue)


def is_larger(values: Sequence[float], control: Sequence[float]) -> float:
    """One-sided Mann-Whitney test: are the values larger than the control's? The p-value is 1 if all values are
    equal.
    """
    if len({*values, *control}) <= 1:
        return 1.0
    return float(_stats().mannwhitneyu(values, control, alternative="greater").pvalue)


def _stats() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError as err:
        raise InvalidRequest(needs("an audit", "scipy", "client")) from err
    return stats
