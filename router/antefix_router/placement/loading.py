"""What loading a stored prefix is worth on a worker, by how fast that worker reads each store. Pure.

A worker tells with its answers how fast it reads the stores that it was asked to read (`antefix.located.ReadSpeed`). A
store on its own host is faster for it than for others, so equal workers differ by where a prompt's blocks are. What
would be loaded slower than it is computed counts as computed: there the worker plans a cold run.
"""

from __future__ import annotations

from collections.abc import Mapping

from antefix.located import ReadSpeed
from antefix_router.placement.work import FETCH_WEIGHT, Work


def loading_tokens(work: Work, resident_tokens: int, speeds: Mapping[str, ReadSpeed], tokens_per_s: float) -> float:
    """In tokens of prefill, of which the worker computes so many per second. resident_tokens: of the prompt, in its
    memory, from the beginning on."""
    stored, left = work.stored_tokens or 0, resident_tokens
    loading = 0.0
    for num_tokens, stores in work.places:
        num_loaded, left = max(0, num_tokens - left), max(0, left - num_tokens)
        num_loaded = min(num_loaded, stored)
        if num_loaded:
            loading += _loading(num_loaded, [speeds[name] for name in stores if name in speeds], tokens_per_s)
    return loading


def _loading(num_tokens: int, speeds: list[ReadSpeed], tokens_per_s: float) -> float:
    if not speeds:
        return FETCH_WEIGHT * num_tokens
    seconds = min(speed.seconds(num_tokens) for speed in speeds)
    return min(seconds * tokens_per_s, float(num_tokens))
