"""The cost of loading a stored prefix on a worker, from the speed at which the worker reads each store. Pure.

A worker reports with its answers how fast it read from each store (`antefix.located.ReadSpeed`). A worker reads a store
on its own host faster than a remote one, and blocks in its host's page cache faster than others, so otherwise equal
workers differ by where a prompt's blocks are. If loading a token would be slower than computing it, the token counts as
computed, because the worker then plans a cold run.
"""

from __future__ import annotations

from collections.abc import Mapping

from antefix.located import ReadSpeed, speed_of
from antefix_router.placement.work import FETCH_WEIGHT, Work


def loading_tokens(work: Work, resident_tokens: int, speeds: Mapping[str, ReadSpeed], tokens_per_s: float) -> float:
    """The cost in tokens of prefill, of which the worker computes `tokens_per_s` per second. resident_tokens: leading
    tokens of the prompt that are in the worker's memory.
    """
    stored, left = work.stored_tokens or 0, resident_tokens
    loading = 0.0
    for num_tokens, stores in work.places:
        num_loaded, left = max(0, num_tokens - left), max(0, left - num_tokens)
        num_loaded = min(num_loaded, stored)
        if num_loaded:
            known = [speed for name in stores if (speed := speed_of(name, speeds)) is not None]
            loading += _loading(num_loaded, known, tokens_per_s)
    return loading


def _loading(num_tokens: int, speeds: list[ReadSpeed], tokens_per_s: float) -> float:
    if not speeds:
        return FETCH_WEIGHT * num_tokens
    seconds = min(speed.seconds(num_tokens) for speed in speeds)
    return min(seconds * tokens_per_s, float(num_tokens))
