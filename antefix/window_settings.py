"""Settings of window state that only make sense together: strategy, window pool, exactness."""

from __future__ import annotations

from antefix.window import Strategies, check_exactness, in_force
from antefix.window_pool import DISK, check_address


def check_window_settings(strategy: str, *, window_pool: str, bounded_windows: int, reproducible: bool) -> None:
    """What `antefix up` and every worker refuse before anything is started.

    Raises:  ConfigError: a setting that is none, or two that contradict each other.
    """
    check_address(window_pool)
    check_exactness(bounded_windows=bounded_windows, reproducible=reproducible)
    for each in Strategies.parse(strategy).all():
        in_force(each, has_pool=window_pool != DISK)
