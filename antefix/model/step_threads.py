"""How many of torch's threads a forward pass uses on a CPU: all of them, or one if its operations are small.

torch's threads divide every operation, and wait for one another at its end. A decode step is some thousand operations
of a few microseconds each, and waking a thread takes longer than that: two threads took three times as long as one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from antefix.model.numerics import ROW_TILE

if TYPE_CHECKING:
    from antefix.model.model import Model

# From this many multiply-adds in a product of hidden size by hidden size on, threads share the work: some 3 ms on one
# core. With antefix-tiny (hidden size 192) 1,800 tokens reach it; with a hidden size of 2,048 a decode step does.
SHARED_WORK = 1 << 26


@contextlib.contextmanager
def step_threads(model: Model, num_tokens: int) -> Iterator[int]:
    """Inside this context, operations use as many threads as make a pass over `num_tokens` tokens faster. The context
    yields the number of all threads.

    Operations use all of torch's threads on a GPU. A pass also uses all threads if the probe has not shown that bits
    do not depend on the number of threads (`model.threads_are_free`).
    """
    threads = torch.get_num_threads()
    rows = -(-num_tokens // ROW_TILE) * ROW_TILE
    is_large = rows * model.config.hidden_size**2 >= SHARED_WORK
    if threads == 1 or is_large or not model.threads_are_free or model.device.type != "cpu":
        yield threads
        return
    with one_thread():
        yield threads


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside this context operations use the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
