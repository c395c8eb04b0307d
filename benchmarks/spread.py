"""The median of repeated measurements, and their spread.

On a machine whose disk and processor are shared, a single figure says little, because one slow minute decides it. So
figures that are compared are measured in turn, in short rounds. A ratio of two figures is the median of the rounds'
ratios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np


def with_spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median as `name`. A quarter of the values lies below `name`_low, and a quarter above `name`_high."""
    low, high = np.quantile(values, (0.25, 0.75)).tolist()
    return {name: statistics.median(values), f"{name}_low": low, f"{name}_high": high}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the true median lies with a certainty of about 95%, by the order of independent values alone."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    first = max(0, math.floor(len(values) / 2 - half))
    return ordered[first], ordered[len(values) - 1 - first]


def over_neighbours(ours: Sequence[float], limits: Sequence[float]) -> list[float]:
    """Each of our figures divided by the mean of the limits that were measured just before and just after the figure.

    Shapes:  ours [N], limits [N + 1], measured in turn, beginning with a limit.
    """
    return [2 * each / (limits[at] + limits[at + 1]) for at, each in enumerate(ours)]
